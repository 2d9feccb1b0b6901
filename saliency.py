"""
Which pixels is a network without attention most sensitive to, and how can it be fooled?

The gradient of the loss with respect to an image shows, for every pixel, how much the loss changes
if the pixel changes a little. Where the gradient is large, the network is sensitive (saliency), and
a small step along its signs can fool the network (adversarial example). Such gradients are
sometimes called implicit attention: translate.py compares them with attention weights where the
right answer is known.

The script draws four simple shapes on cluttered backgrounds, so we know which pixels belong to the
shape, and trains a small network to tell the four apart.

$ python saliency.py --load assets/saliency.pt      # trained weights: all results in seconds
$ python saliency.py                                # train first, in less than a minute
$ python saliency.py --photos                       # four photographs, downloads 47 MB
$ python saliency.py --photos a.jpg b.png           # your own photographs

Simonyan et al. 2014, "Deep Inside Convolutional Networks", https://arxiv.org/abs/1312.6034
Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples",
https://arxiv.org/abs/1412.6572
"""

import argparse
import copy
import math
import os
import sys
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from attention import download, make_folder, number, parse_args


# --------------------------------------------------------------------------------------------------
# The Jacobian of the loss
#
# The loss is the cross-entropy -log p(target), where p(target) is the probability that the network
# gives to the right class.
#
# The Jacobian of a function contains all its partial derivatives: a row for each output, a column
# for each input. The loss is a single number, so its Jacobian is a single row, the gradient: an
# entry for each of the 3 colors * 32 * 32 pixels = 3,072 values of the image. If an entry is 5,
# then increasing that value by 0.01 increases the loss by about 0.05.
#
# Training computes the gradient with respect to the weights. Here the weights are fixed and the
# image is the variable. Backpropagation works for any tensor that requires a gradient.
#
# Images are (B, 3, H, W): batch, colors (red, green, blue), rows, columns. Values are in [0, 1].
@torch.enable_grad()
def calculate_jacobian(model, x, target):
    """The gradient (B, 3, H, W) of the loss at the images x, and the logits (B, n_classes).

    `target` (B,) holds the right classes. The model must be in eval mode.
    """
    # In training mode BatchNorm (see `BasicBlock`) computes mean and variance from the batch, so
    # images would influence each other. In eval mode it uses averages collected during training.
    assert not model.training, "call model.eval() first"
    x = x.detach().requires_grad_()
    logits = model(x)
    # By the chain rule, the gradient starts with the derivatives with respect to the logits:
    # p(target) - 1 for the target, p(class) for every other class. In float32 the first is 0 if
    # p(target) is within 6e-8 of 1. So the loss is computed in float64, and on the CPU, because not
    # every device has float64.
    #
    # Only one term of the sum depends on image i, its own loss. So the gradient of the sum with
    # respect to image i is that of its own loss.
    loss = F.cross_entropy(logits.cpu().double(), target.cpu(), reduction="sum")
    gradient = torch.autograd.grad(loss, x)[0]
    return gradient, logits.detach()


# --------------------------------------------------------------------------------------------------
# Saliency: where does a small change matter most?
#
# The gradient has three numbers for each pixel, one for each color. Saliency is the length of this
# vector: it shows where a change matters, but not in which direction. (Simonyan et al. take the
# maximum over colors, and the gradient of the target's logit.)
def saliency_map(gradient):
    """Gradient (B, 3, H, W) -> saliency (B, H, W): L2 norm over colors, rescaled to [0, 1].

    0 marks the image's least sensitive pixel, which may still have influence.
    """
    # The gradient of a confident prediction can be 1e-30. Its square would be 0 in float32.
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)              # (B, 1, 1, 1)
    tiny = torch.finfo(gradient.dtype).tiny     # a constant map becomes 0 / tiny instead of 0 / 0
    norm = (gradient / largest.clamp_min(tiny)).norm(dim=1)                 # (B, H, W)
    low = norm.amin(dim=(1, 2), keepdim=True)                               # (B, 1, 1)
    high = norm.amax(dim=(1, 2), keepdim=True)
    return (norm - low) / (high - low).clamp_min(tiny)


# --------------------------------------------------------------------------------------------------
# Adversarial examples: which small change matters most?
#
# To fool the network, change the image so that the loss increases, because then p(target)
# decreases. Let d be a change in which no value changes by more than eps. For a small eps, the loss
# increases by about sum(g * d), where g is the gradient. Each term g_i * d_i is largest if d_i is
# eps where g_i is positive, and -eps where it is negative. So the best change is eps times the
# *sign* of the gradient, whatever its size. This is the fast gradient sign method (FGSM).
#
# An example with three values, g = (3, -1, 0.1):
#
#                          d / eps             the loss increases by about
#     sign step            1, -1, 1            eps * (3 + 1 + 0.1)       = eps * 4.1
#     scaled Jacobian      1, -0.33, 0.03      eps * (3 + 0.33 + 0.003)  = eps * 3.34
#     random signs         +-1, +-1, +-1       0 on average, with standard deviation eps * 3.16
#                                              (the variances 9, 1 and 0.01 add up to 3.16^2)
#
# The scaled Jacobian is eps * g / max |g|: only the largest entry of g uses all of eps. Random
# signs show what a change of the same size does without the gradient. An image has 3,072 values
# instead of three. In the sign step all of them increase the loss, so many small changes add up.
# With random signs they mostly cancel: for n entries of equal size, the sign step adds up n of
# them, and random signs about sqrt(n), here 3,072 and 55.
def adversarial_example(model, x, target, eps):
    """Images in [0, 1], each value of x changed by at most eps so that the loss increases."""
    gradient, _ = calculate_jacobian(model, x, target)
    return (x + eps * gradient.sign()).clamp(0, 1)


def four_changes(gradient, eps):
    """Four changes of the images, {name: (B, 3, H, W)}. Only the unscaled one can exceed eps."""
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)              # (B, 1, 1, 1)
    return {
        "sign step": eps * gradient.sign(),
        "scaled Jacobian": eps * gradient / largest,
        "unscaled Jacobian": gradient,
        "random signs": eps * torch.randn_like(gradient).sign(),
    }


# --------------------------------------------------------------------------------------------------
# Model: a small ResNet (He et al. 2016, https://arxiv.org/abs/1512.03385)
#
# A convolution computes each output pixel from a 3 x 3 square of its input, with the same weights
# everywhere. It has many outputs for each pixel, the channels. With stride 2 it keeps every second
# row and column. BatchNorm brings each channel to mean 0 and variance 1, so that its scale does not
# depend on the layers before, and then applies a learned scale and bias. A residual connection adds
# a block's input to its output, so that gradients get through deep networks.
class BasicBlock(nn.Module):
    """Two convolutions, residual connection: (B, c_in, H, W) -> (B, c_out, H/stride, W/stride)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        # if the output's shape differs from the input's, a 1 x 1 convolution adapts the input
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(c_out),
            )

    def forward(self, x):
        residual = x
        if self.downsample is not None:
            residual = self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + residual)


def small_resnet(n_classes):
    """A network for images (B, 3, 32, 32), with 72,980 parameters for 4 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),                         # (B, 16, 32, 32)
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 32, stride=2),                                       # (B, 32, 16, 16)
        BasicBlock(32, 64, stride=2),                                       # (B, 64, 8, 8)
        nn.AdaptiveAvgPool2d(1),                        # the mean over all pixels: (B, 64, 1, 1)
        nn.Flatten(),                                                       # (B, 64)
        nn.Linear(64, n_classes),                                           # (B, n_classes)
    )


def load_weights(model, path):
    """Load the model's state_dict from a file, or exit."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception:                               # torch.load can fail in many ways
        sys.exit(f"cannot load {path}: --load needs a file with weights of this network")


# --------------------------------------------------------------------------------------------------
# Data: four shapes on cluttered backgrounds (can be skipped)
#
# Each function below tells which points (u, v) are on a shape. The shape is upright, centered at u
# = v = 0, and extends at most 1.2 from there. v points down.
SIZE = 32
CLASSES = ["cross", "triangle", "bars", "screw"]


def cross(u, v):
    """A horizontal and a vertical bar."""
    horizontal = (u.abs() < 0.95) & (v.abs() < 0.24)
    vertical = (u.abs() < 0.24) & (v.abs() < 0.95)
    return horizontal | vertical


def triangle(u, v):
    """The outline of a triangle."""
    # The bottom is where v is large. The other two sides are the bottom rotated by 120 degrees, to
    # the left and to the right. u.abs() does both at once.
    distance = torch.maximum(v, 0.87 * u.abs() - 0.5 * v)
    return (distance > 0.26) & (distance < 0.6)


def bars(u, v):
    """Two horizontal bars, one above the other."""
    return (u.abs() < 0.8) & (v.abs() > 0.3) & (v.abs() < 0.74)


def screw(u, v):
    """The head of a screw: a disc with a horizontal slot cut out."""
    return (torch.hypot(u, v) < 0.85) & (v.abs() > 0.2)


def uniform(n, low, high):
    """A random number between low and high for each image, (n, 1, 1, 1)."""
    return low + (high - low) * torch.rand(n, 1, 1, 1)


def make_images(n, upright=False):
    """n random images (n, 3, 32, 32), labels (n,), and masks (n, 32, 32), True on the shape.

    With `upright`, every shape is in the center, not rotated, and as large as possible.
    """
    pixel = torch.arange(SIZE) + 0.5
    x = pixel.view(1, 1, 1, SIZE)
    y = pixel.view(1, 1, SIZE, 1)

    # The background: a random color, with six soft blobs of other colors
    images = torch.rand(n, 3, 1, 1)
    for _ in range(6):
        distance = torch.hypot(x - uniform(n, 0, SIZE), y - uniform(n, 0, SIZE))
        width = uniform(n, 2, 8)
        color = torch.rand(n, 3, 1, 1)
        blob = torch.exp(-0.5 * (distance / width) ** 2)        # (n, 1, 32, 32), 1 at the center
        images = images.lerp(color, blob)

    # In each color channel, the shape is bright (0.75 to 1) on a darker background (0 to 0.55), or
    # dark (0 to 0.25) on a brighter one (0.45 to 1). So no color gives the shape away.
    bright = torch.randint(2, (n, 3, 1, 1))
    images = 0.55 * images + 0.45 * (1 - bright)
    color = 0.75 * bright + 0.25 * torch.rand(n, 3, 1, 1)

    # To move, enlarge and rotate a shape, keep its formula and change the coordinates: u and v are
    # those of the pixels as seen from the shape.
    radius = uniform(n, 6.5, 9)
    center_x = uniform(n, 9, SIZE - 9)
    center_y = uniform(n, 9, SIZE - 9)
    angle = uniform(n, 0, 2 * math.pi)
    if upright:
        radius.fill_(9)
        center_x.fill_(SIZE / 2)
        center_y.fill_(SIZE / 2)
        angle.fill_(0)
    x = (x - center_x) / radius
    y = (y - center_y) / radius
    u = x * torch.cos(angle) + y * torch.sin(angle)                         # (n, 1, 32, 32)
    v = y * torch.cos(angle) - x * torch.sin(angle)

    # Draw all four shapes, and keep for each image the one of its label
    labels = torch.randint(len(CLASSES), (n,))
    shapes = torch.stack([cross(u, v), triangle(u, v), bars(u, v), screw(u, v)])
    masks = shapes[labels, torch.arange(n)]                                 # (n, 1, 32, 32)
    images = torch.where(masks, color, images)

    noise = 0.02 * torch.randn(images.shape)
    images = (images + noise).clamp(0, 1)
    return images, labels, masks.squeeze(1)


# --------------------------------------------------------------------------------------------------
# Experiment 1: does saliency point at the shape?
#
# Pointing is how often the most salient pixel is at most two pixels away from the shape (the
# pointing game, Zhang et al. 2016, https://arxiv.org/abs/1608.00507). All shapes are near the
# middle of the image, so even a map that ignores the image finds many of them. The last column of
# the table is the control: it scores the same maps against the shape of another image, which they
# should not find. (The trained network's maps find more of these, because they point nearer to the
# middle: 6 pixels from it on average, against 11 before training.)
#
# - Trained network. The most salient pixel is nearly always within two pixels of the shape, but
#   exactly on it in only a third of the images. Others are in the gaps of the shape (inside the
#   triangle, in the slot of the screw). Saliency shows where a *change* matters, and it is larger
#   in the gaps than on the shape: painting the slot would make the screw a disc.
# - Untrained network. It has learned nothing, yet its maps point at the image's own shape more
#   often than at another's. On average the gradient is only a tenth larger at the shape than
#   elsewhere, but its largest 1% of values are twice as frequent there (measured with twelve
#   networks). A plausible reason is that a ReLU passes the gradient on only where its input is
#   positive, which changes at edges, and the shape has the sharpest edges. A map that shows the
#   object therefore does not prove that the network has learned anything (Adebayo et al. 2018,
#   "Sanity Checks for Saliency Maps", https://arxiv.org/abs/1810.03292).
# - Edge detector. It cannot tell the classes apart, and yet it is always within two pixels. So
#   pointing measures whether a map finds the object, and not whether it explains the decision.
@torch.no_grad()
def predict(model, images):
    """Probabilities (B, n_classes)."""
    return model(images).softmax(dim=1)


def is_correct(model, images, labels):
    """Whether the most probable class of each image is its label, (B,)."""
    return predict(model, images).argmax(dim=1) == labels


def accuracy_of(model, images, labels):
    """Fraction of the images whose most probable class is the label."""
    return is_correct(model, images, labels).float().mean().item()


def pointing_of(saliency, masks):
    """How often the most salient pixel is within two pixels of the shape, diagonally too."""
    best = saliency.flatten(1).argmax(dim=1, keepdim=True)                  # (B, 1)
    # the maximum over the 5 x 5 square around each pixel: 1 near the shape, else 0
    near_shape = F.max_pool2d(masks.float(), kernel_size=5, stride=1, padding=2)
    return near_shape.flatten(1).gather(1, best).mean().item()


def edge_map(images):
    """How fast the colors change at each pixel, (B, H, W): an edge detector."""
    vertical, horizontal = torch.gradient(images, dim=(2, 3))               # (B, 3, H, W) each
    return torch.hypot(vertical, horizontal).norm(dim=1)


def measure_pointing(gradient, gradient_untrained, images, masks):
    """Print how often three maps point at the shape of their image, and at that of another one."""
    maps = {
        "trained network": saliency_map(gradient),
        "untrained network": saliency_map(gradient_untrained),
        "edge detector": edge_map(images),
    }
    print("within two pixels of      own shape    another image's shape")
    for name, saliency in maps.items():
        own = pointing_of(saliency, masks)
        other = pointing_of(saliency, masks.roll(1, dims=0))
        print(f"{name:22}{own:13.4f}{other:25.4f}")


# --------------------------------------------------------------------------------------------------
# Experiment 2: which change of the image fools the network?
#
# - The unscaled Jacobian, the gradient added as it is, fools the same few images at every eps,
#   because its size depends not on eps but on how unsure the network is: its first factors are at
#   most 1 - p(target) (see `calculate_jacobian`), and for most images that is tiny.
# - At eps = 16/255 random signs fool more images than the scaled Jacobian, because they change each
#   value by eps, and the scaled Jacobian only one. If some random signs increase the loss, to first
#   order the opposite signs decrease it. In fact the opposite signs usually increase it, too. So
#   for such strong noise the loss is far from linear.
EPS = [0, 2, 4, 8, 16]  # in units of 1/255


def compare_attacks(model, images, labels, gradient):
    """Print the accuracy after each change, for each eps."""
    print("accuracy eps         sign step   scaled Jacobian unscaled Jacobian      random signs")
    for eps in EPS:
        print(f"{eps:8}/255", end="")
        for change in four_changes(gradient, eps / 255).values():
            attacked = (images + change).clamp(0, 1)
            accuracy = accuracy_of(model, attacked, labels)
            print(f"{accuracy:18.4f}", end="")
        print()


# --------------------------------------------------------------------------------------------------
# Figures
def _show(axis, image, title, **options):
    """Draw an image (3, H, W) or a map (H, W)."""
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
    drawn = axis.imshow(image.cpu().numpy(), **options)
    axis.set_title(title, fontsize=9, parse_math=False)
    axis.set_axis_off()
    return drawn


def _show_predictions(axes, title, model, images, labels, names):
    """An image on each axis, with its most probable class, in red if it is wrong."""
    best = predict(model, images).max(dim=1)
    for i, axis in enumerate(axes):
        label = best.indices[i].item()
        probability = best.values[i].item()
        _show(axis, images[i], f"{title}{names[label]} {probability:.3f}")
        if label != labels[i]:
            axis.title.set_color("red")


def _save(figure, path):
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


def plot_samples(model, images, labels, names, path):
    """A column for each image, with its saliency below, and a circle at the most salient pixel."""
    gradient, _ = calculate_jacobian(model, images, labels)
    saliency = saliency_map(gradient).cpu()
    n = len(images)
    figure, axes = plt.subplots(2, n, figsize=(2.4 * n, 5), squeeze=False, layout="constrained")
    _show_predictions(axes[0], "", model, images, labels, names)
    for i in range(n):
        _show(axes[1, i], saliency[i], "saliency", vmin=0, vmax=1)
        best = saliency[i].argmax().item()
        row, column = divmod(best, saliency.size(2))
        for axis in axes[:, i]:
            axis.scatter(column, row, s=60, facecolors="none", edgecolors="white")
    _save(figure, path)


def plot_mean_saliency(model, untrained, device, path):
    """The mean saliency map of each class, before and after training, for upright shapes."""
    images, labels, masks = make_images(200, upright=True)
    figure, axes = plt.subplots(2, len(CLASSES), figsize=(9, 4.4), layout="constrained")
    for row, name, network in zip(axes, ["trained", "untrained"], [model, untrained]):
        gradient, _ = calculate_jacobian(network, images.to(device), labels.to(device))
        saliency = saliency_map(gradient).cpu()
        for c, axis in enumerate(row):
            of_class = labels == c
            mean = saliency[of_class].mean(dim=0)
            drawn = _show(axis, mean, f"{CLASSES[c]}, {name}", vmin=0, vmax=1)
            mask = masks[of_class][0].float().numpy()           # all masks of a class are equal
            axis.contour(mask, levels=[0.5], colors="white", linewidths=0.8)
    figure.colorbar(drawn, ax=axes, label="mean saliency")
    _save(figure, path)


def plot_adversarial(model, images, labels, names, eps, path):
    """A row for each image: the image, the sign step, and the image after it."""
    adversarial = adversarial_example(model, images, labels, eps)
    change = (adversarial - images) / (2 * eps) + 0.5           # from [-eps, eps] to [0, 1]
    n = len(images)
    figure, axes = plt.subplots(n, 3, figsize=(7.5, 2.6 * n), squeeze=False, layout="constrained")
    _show_predictions(axes[:, 0], "original: ", model, images, labels, names)
    for axis, image in zip(axes[:, 1], change.clamp(0, 1)):
        _show(axis, image, "sign step")
    _show_predictions(axes[:, 2], "after the sign step: ", model, adversarial, labels, names)
    figure.suptitle(f"eps = {255 * eps:.3g}/255. Red title: wrong. Sign step: white is eps in all "
                    "three colors, black is -eps", fontsize=9)
    _save(figure, path)


# --------------------------------------------------------------------------------------------------
# Appendix (can be skipped): photographs and ResNet-18
#
# This part draws samples and adversarial examples for photographs, with a ResNet-18 trained on
# ImageNet. The attributes have torchvision's names, so that its weights load. We could not download
# them, so these figures are untested.
class ResNet18(nn.Module):
    """torchvision's ResNet-18, 11,689,512 parameters: (B, 3, 224, 224) -> logits (B, 1000)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        self.fc = nn.Linear(512, 1000)

    def forward(self, x):
        # Mean and standard deviation of ImageNet's colors. torchvision normalizes before the
        # network. Here the network does it, so that eps is a change of pixel values.
        mean = x.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = x.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        x = (x - mean) / std
        x = F.relu(self.bn1(self.conv1(x)))                                 # (B, 64, 112, 112)
        x = self.maxpool(x)                                                 # (B, 64, 56, 56)
        x = self.layer1(x)
        x = self.layer2(x)                                                  # (B, 128, 28, 28)
        x = self.layer3(x)                                                  # (B, 256, 14, 14)
        x = self.layer4(x)                                                  # (B, 512, 7, 7)
        x = x.mean(dim=(2, 3))
        return self.fc(x)


def read_image(path):
    """The image in a file as (3, 224, 224), prepared as torchvision does for its ResNet-18.

    The shorter side becomes 256 pixels, then the center is kept. EXIF rotation is ignored.
    """
    try:
        # With a format that is not "png", matplotlib lets Pillow look at the content.
        pixels = plt.imread(path, format="any")                 # (H, W) or (H, W, 3)
        if pixels.dtype == "uint8":                             # PNG files arrive in [0, 1]
            pixels = pixels / 255
        x = torch.tensor(pixels, dtype=torch.float32)
        if x.ndim == 2:                                         # gray: the same for three colors
            x = x.unsqueeze(2).expand(-1, -1, 3)
        if x.size(2) != 3 or x.max() > 1:
            raise ValueError
    except Exception:                                           # every format has its own errors
        sys.exit(f"cannot read {path}: no such file, or not 8-bit RGB or gray")

    height, width, _ = x.shape
    shorter = min(height, width)
    height = 256 * height // shorter
    width = 256 * width // shorter
    x = x.permute(2, 0, 1).unsqueeze(0)                         # (1, 3, H, W)
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
    top = round((height - 224) / 2)
    left = round((width - 224) / 2)
    return x[0, :, top:top + 224, left:left + 224].clamp(0, 1)


DATA_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
WEIGHTS_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
WEIGHTS_SHA256 = "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"
NAMES_URL = ("https://raw.githubusercontent.com/pytorch/hub/"
             "a6fc887fbbbda0dd37c440bf8a145f1da6707d6b/imagenet_classes.txt")
NAMES_SHA256 = "1f386e0d1cb6e28b9c2dac651c3dea6801e98ad1b41a14ce6bb1a093d72069f5"
PHOTOGRAPHS_URL = "https://raw.githubusercontent.com/EliSchwartz/imagenet-sample-images/master/"
PHOTOGRAPHS = [  # file, class, SHA-256
    ("n01534433_junco.JPEG", 13,
     "72d3955d40e0a4c0e948b34c8271de38f4922b22f7f50c7aae7e0dabe48c33b6"),
    ("n02102040_English_springer.JPEG", 217,
     "c3386e4f5277915b684195a6badcabf913f5e91c1a5f6bdea71aae40b5e335e6"),
    ("n02326432_hare.JPEG", 331,
     "8ef47acf3deec515ca8638578112f34a1814218e997ad7ce78eaafcf41aa993a"),
    ("n02480855_gorilla.JPEG", 366,
     "d6c3f329e35532dd262dd4bbf0088edc951ca9448e4ec2619efee7c552282256"),
]


def photographs(args):
    """Draw two figures for args.photos, or else for PHOTOGRAPHS. Returns the results as text."""
    files = args.photos
    if not files:
        files = [download(PHOTOGRAPHS_URL + name, DATA_FOLDER, sha256)
                 for name, _, sha256 in PHOTOGRAPHS]
    images = torch.stack([read_image(file) for file in files]).to(args.device)
    model = ResNet18().eval()
    load_weights(model, args.load or download(WEIGHTS_URL, DATA_FOLDER, WEIGHTS_SHA256))
    model = model.to(args.device)
    with open(download(NAMES_URL, DATA_FOLDER, NAMES_SHA256), encoding="utf-8") as file:
        names = file.read().splitlines()

    # Your own photographs have no labels: take the predicted class, so that accuracy is 1.
    if args.photos:
        labels = predict(model, images).argmax(dim=1)
    else:
        labels = torch.tensor([label for _, label, _ in PHOTOGRAPHS], device=args.device)
    make_folder(args.out_dir)
    path = os.path.join(args.out_dir, "saliency_photographs.png")
    plot_samples(model, images, labels, names, path)
    path = os.path.join(args.out_dir, "saliency_photographs_adversarial.png")
    plot_adversarial(model, images[:3], labels[:3], names, args.eps, path)

    adversarial = adversarial_example(model, images, labels, args.eps)
    accuracy = accuracy_of(model, images, labels)
    accuracy_attacked = accuracy_of(model, adversarial, labels)
    n_params = sum(p.numel() for p in model.parameters())
    return (f"accuracy={accuracy:.4f} accuracy_attacked={accuracy_attacked:.4f} "
            f"params={n_params}")


if __name__ == "__main__":
    start = time.perf_counter()

    # options
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eps", type=number(float, 1e-4, 1), default=8 / 255,
                        help="largest change of a pixel value, for the figure and the result "
                             "(default: 8/255)")
    parser.add_argument("--steps", type=number(int, 1), default=650,
                        help="training steps (default: 650)")
    parser.add_argument("--lr", type=number(float, 0), default=0.01,
                        help="peak learning rate (default: 0.01)")
    parser.add_argument("--n_images", type=number(int, 100), default=1000,
                        help="images for the evaluation (default: 1000)")
    parser.add_argument("--load", metavar="FILE",
                        help="do not train (or with --photos, download): use these weights")
    parser.add_argument("--photos", nargs="*", metavar="FILE",
                        help="run ResNet-18 on these photographs (no FILE: four from ImageNet)")
    args = parse_args(parser)
    if args.photos is not None:
        result = photographs(args)
        seconds = time.perf_counter() - start
        print(f"result: {result} seconds={seconds:.1f}")
        sys.exit()

    # data: images for the evaluation; training draws new ones for each batch
    images, labels, masks = make_images(args.n_images)
    images = images.to(args.device)
    labels = labels.to(args.device)
    masks = masks.to(args.device)

    # model and optimizer; the learning rate rises during the first 15% of the steps, then falls;
    # channels_last is a memory layout that makes convolutions on a CPU faster.
    model = small_resnet(len(CLASSES)).to(args.device, memory_format=torch.channels_last)
    untrained = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps,
                                                    pct_start=0.15, cycle_momentum=False)

    # trained weights, or training loop
    if args.load:
        load_weights(model, args.load)
    make_folder(args.out_dir)
    if not args.load:
        for step in range(args.steps):
            # get a batch
            x, y, _ = make_images(64)
            x = x.to(args.device)
            y = y.to(args.device)

            # forward
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            if not loss.isfinite():
                sys.exit(f"step {step}: the loss is {loss.item()}, try a smaller --lr")

            # backward and update
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

            # log; the first loss is not quite ln 4, because the initial logits are not 0
            if step == 0:
                print(f"step 0/{args.steps}: loss {loss:.4f}, "
                      f"uniform prediction ln {len(CLASSES)} = {math.log(len(CLASSES)):.4f}")
            if (step + 1) % 50 == 0:
                print(f"step {step + 1}/{args.steps}: loss {loss:.4f}")

        path = os.path.join(args.out_dir, "saliency.pt")
        torch.save(model.state_dict(), path)
        print(f"saved {path}, try: python saliency.py --load {path}")
    model.eval()

    # evaluation
    accuracy = accuracy_of(model, images, labels)
    print(f"{args.n_images:,} new images: accuracy {accuracy:.4f}\n")
    gradient, _ = calculate_jacobian(model, images, labels)
    gradient_untrained, _ = calculate_jacobian(untrained, images, labels)
    measure_pointing(gradient, gradient_untrained, images, masks)
    pointing = pointing_of(saliency_map(gradient), masks)
    print()
    torch.manual_seed(args.seed)            # the same random signs after training and with --load
    compare_attacks(model, images, labels, gradient)
    adversarial = adversarial_example(model, images, labels, args.eps)
    accuracy_attacked = accuracy_of(model, adversarial, labels)
    print()

    # figures
    first = [labels.tolist().index(c) for c in range(len(CLASSES))]         # one of each class
    path = os.path.join(args.out_dir, "saliency_samples.png")
    plot_samples(model, images[first], labels[first], CLASSES, path)
    path = os.path.join(args.out_dir, "saliency_mean.png")
    plot_mean_saliency(model, untrained, args.device, path)
    fooled = is_correct(model, images, labels) & ~is_correct(model, adversarial, labels)    # (B,)
    chosen = fooled.int().argsort(descending=True, stable=True)[:3]         # True before False
    path = os.path.join(args.out_dir, "saliency_adversarial.png")
    plot_adversarial(model, images[chosen], labels[chosen], CLASSES, args.eps, path)
    n_params = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - start
    print(f"result: accuracy={accuracy:.4f} pointing={pointing:.4f} "
          f"accuracy_attacked={accuracy_attacked:.4f} params={n_params} seconds={seconds:.1f}")
