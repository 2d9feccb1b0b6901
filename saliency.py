"""
To which pixels is a network without attention most sensitive, and how is it fooled?

A convolutional network has no attention weights to plot, but we can compute the Jacobian of the loss with respect to
the image. The loss is a scalar, so this is its gradient. Where it is large, a small change of the image matters most
(saliency). A small step along its signs can fool the network (adversarial example).

The script draws its own images, simple shapes on a cluttered background, and trains a small ResNet on them. The
pixels of each shape are known, so we can measure how often the most salient pixel is within two pixels of the shape
(pointing). With --weights it draws two of the figures for photographs, with a ResNet-18 trained on ImageNet.

$ python saliency.py --load assets/saliency.pt                      # trained weights: the figures in seconds
$ python saliency.py                                                # train first, in less than a minute
$ python saliency.py --weights imagenet                             # seven photographs, downloads 48 MB
$ python saliency.py --weights imagenet --image a.jpg b.png         # your own photographs

Simonyan et al. 2014, "Deep Inside Convolutional Networks", https://arxiv.org/abs/1312.6034 (saliency)
Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples", https://arxiv.org/abs/1412.6572 (sign step)
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

from attention import download, parse_args, positive


# ----------------------------------------------------------------------------------------------------------------------
# The Jacobian, and what it is good for. Images are (B, 3, H, W) with values in [0, 1].
@torch.enable_grad()
def calculate_jacobian(model, x, target):
    """Gradient (B, 3, H, W) of the loss with respect to the images x (B, 3, H, W), and the logits (B, n_classes).

    The loss is the cross-entropy with `target` (B,), summed over images, and BatchNorm is in eval mode (in training
    mode it mixes the images of a batch), so the gradient of an image is the same alone and in a batch.
    """
    model = copy.deepcopy(model).eval()  # a copy, so the caller's model keeps its mode
    x = x.detach().requires_grad_()                                         # (B, 3, H, W)
    logits = model(x)                                                       # (B, n_classes)
    # The gradient with respect to the logits is softmax - one_hot. For a confident prediction float32 rounds the
    # target's p - 1 to 0 once its logit leads by about 17, float64 by about 37. On the CPU because mps has no float64.
    loss = F.cross_entropy(logits.cpu().double(), target.cpu(), reduction="sum")
    gradient = torch.autograd.grad(loss, x)[0]                              # (B, 3, H, W)
    return gradient, logits.detach()


def saliency_map(gradient):
    """Gradient (B, 3, H, W) -> saliency (B, H, W): L2 norm over colors (Simonyan: maximum), rescaled to [0, 1]."""
    red, green, blue = gradient.unbind(dim=1)                               # (B, H, W) each
    norm = torch.hypot(torch.hypot(red, green), blue)  # hypot: the squares of tiny gradients would be 0
    low, high = norm.amin(dim=(1, 2), keepdim=True), norm.amax(dim=(1, 2), keepdim=True)    # (B, 1, 1)
    return (norm - low) / (high - low).clamp_min(torch.finfo(norm.dtype).tiny)              # (B, H, W)


def adversarial_example(model, x, target, eps, steps=1):
    """Images in [0, 1] within eps of x, after `steps` sign steps of eps / steps that increase the loss.

    One step is the fast gradient sign method (FGSM, Goodfellow et al. 2015); several recompute the gradient on the way.
    """
    adversarial = x.detach()                                                # (B, 3, H, W)
    for _ in range(steps):
        gradient, _ = calculate_jacobian(model, adversarial, target)        # (B, 3, H, W)
        adversarial = (adversarial + eps / steps * gradient.sign()).clamp(0, 1)
    return adversarial


# Why the sign? To first order, a change d of the image adds sum(g * d) to the loss, with g the gradient. Let
# L1 = sum |g|, L2 = sqrt(sum g^2) and Linf = max |g|. If no value may change by more than eps, then
#
#     sign step          d = eps * sign(g)      adds eps * L1             the maximum: every value changes by eps
#     scaled Jacobian    d = eps * g / Linf     adds eps * L2^2 / Linf    only the largest entry changes by eps
#     random signs       d = eps * (+1 or -1)   adds 0 on average, with standard deviation eps * L2
#
# and L1 >= L2^2 / Linf >= L2. If all n = 3 * H * W entries of g have the same magnitude, L1 = sqrt(n) * L2: the larger
# the image, the larger the lead over random signs. The unscaled Jacobian is tiny if p(target) is close to 1.


def all_attacks(model, x, target, eps, steps):
    """Four attacks, {name: images}. All but the unscaled Jacobian change a value by at most eps."""
    gradient, _ = calculate_jacobian(model, x, target)                      # (B, 3, H, W)
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # (B, 1, 1, 1)
    return {"sign step": adversarial_example(model, x, target, eps, steps),
            "scaled Jacobian": (x + eps * gradient / largest).clamp(0, 1),
            "unscaled Jacobian": (x + gradient).clamp(0, 1),
            "random signs": (x + eps * torch.randn_like(x).sign()).clamp(0, 1)}


# ----------------------------------------------------------------------------------------------------------------------
# The network, with torchvision's names, so that its ResNet-18 weights load
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual connection: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:  # the input needs the output's shape to be added to it
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))                                 # (B, c_out, H / stride, W / stride)
        y = self.bn2(self.conv2(y))                                         # (B, c_out, H / stride, W / stride)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18 (He et al. 2016, https://arxiv.org/abs/1512.03385): (B, 3, 224, 224) -> logits (B, n_classes)."""

    def __init__(self, n_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        self.fc = nn.Linear(512, n_classes)

    def forward(self, x):
        # mean and std of ImageNet's colors; torchvision normalizes outside, but here eps is a change of pixel values
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        x = F.relu(self.bn1(self.conv1((x - mean) / std)))                  # (B, 64, 112, 112)
        x = self.layer1(self.maxpool(x))                                    # (B, 64, 56, 56)
        x = self.layer2(x)                                                  # (B, 128, 28, 28)
        x = self.layer3(x)                                                  # (B, 256, 14, 14)
        x = self.layer4(x)                                                  # (B, 512, 7, 7)
        return self.fc(x.mean(dim=(2, 3)))                                  # (B, n_classes)


def resnet18(num_classes=1000):
    """As `torchvision.models.resnet18`: 11,689,512 parameters for 1,000 classes."""
    return ResNet(num_classes)


def small_resnet(n_classes):
    """The same blocks for small images (B, 3, 32, 32): 73,045 parameters for 5 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),          # (B, 16, 32, 32)
        BasicBlock(16, 32, stride=2),                                       # (B, 32, 16, 16)
        BasicBlock(32, 64, stride=2),                                       # (B, 64, 8, 8)
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_classes))    # (B, n_classes)


def load_weights(model, path):
    """Load a state_dict from the file `path` into the model."""
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # no such file, not a file of weights, or the weights of another network
        sys.exit(f"cannot load {path}: {' '.join(str(error).split()).split('. ')[0][:120]}")


# ----------------------------------------------------------------------------------------------------------------------
# Images: one shape at a random place, size, angle and color, on a cluttered background

CLASSES = ["star", "cross", "triangle", "bars", "moon"]
SIZE = 32


def make_images(n):
    """n random images (n, 3, 32, 32), their labels (n,), and masks (n, 32, 32) that are True on the shape."""
    def uniform(low, high, k=1):
        """Random numbers (n, k, 1, 1)."""
        return low + (high - low) * torch.rand(n, k, 1, 1)

    def rotated(x_0, y_0, angle):
        """Coordinates of all pixels around the point (x_0, y_0), rotated by `angle`."""
        y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
        return (x - x_0) * angle.cos() + (y - y_0) * angle.sin(), (y - y_0) * angle.cos() - (x - x_0) * angle.sin()

    # The background: stripes of two colors and five blobs
    position, _ = rotated(0, 0, uniform(0, math.pi))                        # (n, 1, H, W)
    stripes = 0.5 + 0.5 * torch.sin(2 * math.pi * (position / uniform(3, 12) + uniform(0, 1)))
    images = uniform(0, 1, 3).lerp(uniform(0, 1, 3), stripes * uniform(0, 1))                # (n, 3, H, W)
    for _ in range(5):
        u, v = rotated(uniform(0, SIZE), uniform(0, SIZE), uniform(0, math.pi))
        images = images.lerp(uniform(0, 1, 3), torch.exp(-(u ** 2 + v ** 2) / (2 * uniform(2, 6) ** 2)))
    # In each color channel the shape is bright and the background dark, or the reverse
    bright = torch.randint(2, (n, 3, 1, 1))
    images = 0.55 * images + 0.45 * (1 - bright)
    color = 0.75 * bright + uniform(0, 0.25, 3)                             # (n, 3, 1, 1)
    # Four faint strokes as distractors, drawn by signed distance: negative inside, edges antialiased over one pixel
    u, v = rotated(uniform(0, SIZE, 4), uniform(0, SIZE, 4), uniform(0, math.pi, 4))         # (n, 4, H, W)
    distance = torch.maximum(u.abs() - uniform(0.5, 3, 4), v.abs() - uniform(0.4, 0.8, 4)).amin(dim=1, keepdim=True)
    images = images.lerp(color, 0.3 * (0.5 - distance).clamp(0, 1))
    # The approximate signed distance of every pixel to each of the five shapes, in units of the radius
    radius = uniform(6.5, 9)                                                # (n, 1, 1, 1)
    u, v = rotated(*(radius + (SIZE - 2 * radius) * uniform(0, 1, 2)).split(1, dim=1), uniform(0, 2 * math.pi))
    u, v = u / radius, v / radius                                           # (n, 1, H, W)
    r, near, far = torch.hypot(u, v), torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    distances = torch.cat([r - 0.60 - 0.30 * torch.cos(5 * torch.atan2(v, u)),                              # star
                           torch.maximum(near - 0.24, far - 0.95),                                          # cross
                           (torch.maximum(v, 0.87 * u.abs() - 0.5 * v) - 0.43).abs() - 0.17,                # triangle
                           torch.maximum((v.abs() - 0.52).abs() - 0.22, u.abs() - 0.80),                    # bars: =
                           torch.maximum(r - 0.95, 0.75 - torch.hypot(u - 0.5, v))], dim=1)                 # moon
    labels = torch.randint(len(CLASSES), (n,))                              # (n,)
    distance = (distances * radius)[torch.arange(n), labels].unsqueeze(1)   # (n, 1, H, W) in pixels
    images = images.lerp(color, (0.5 - distance).clamp(0, 1))
    return (images + 0.02 * torch.randn(images.shape)).clamp(0, 1), labels, distance.squeeze(1) < 0


# ----------------------------------------------------------------------------------------------------------------------
# Measures and figures
@torch.no_grad()
def predict(model, images):
    """Probabilities (B, n_classes)."""
    return model.eval()(images).softmax(dim=1)


def accuracy_of(model, images, labels):
    """Fraction of images whose most probable class is the label."""
    return (predict(model, images).argmax(dim=1) == labels).float().mean().item()


def pointing_of(model, images, labels, masks):
    """Fraction of images where the most salient pixel is on the shape, within two pixels, and the latter by chance."""
    saliency = saliency_map(calculate_jacobian(model, images, labels)[0])   # (B, H, W)
    best = saliency.flatten(1).argmax(dim=1, keepdim=True)                  # (B, 1)
    near = F.max_pool2d(masks.float().unsqueeze(1), 5, 1, padding=2).flatten(1)             # (B, H * W)
    on_shape = masks.float().flatten(1).gather(1, best)                     # (B, 1)
    return on_shape.mean().item(), near.gather(1, best).mean().item(), near.mean().item()


def plot_samples(model, images, labels, titles, names, path):
    """One row for each image: the image, its saliency, both, and its three most probable classes (also printed)."""
    saliency = saliency_map(calculate_jacobian(model, images, labels)[0]).cpu()              # (B, H, W)
    top = predict(model, images).topk(3, dim=1)                             # values and indices, (B, 3) each
    figure, axes = plt.subplots(len(images), 4, figsize=(9, 2.1 * len(images)), squeeze=False, layout="constrained")
    for i, row in enumerate(axes):
        classes, p = [names[c] for c in top.indices[i].tolist()], top.values[i].tolist()
        print(f"{titles[i]}: " + ", ".join(f"{name} {p_c:.3f}" for name, p_c in zip(classes, p)))
        image, heat = images[i].permute(1, 2, 0).cpu(), saliency[i]         # (H, W, 3), (H, W)
        row[0].imshow(image.numpy())
        row[0].set_title(titles[i], fontsize=7 if len(titles[i]) > 20 else 9, parse_math=False)
        row[1].imshow(heat.numpy(), vmin=0, vmax=1)
        row[2].imshow(image.mean(dim=-1).numpy(), vmin=0, vmax=1, cmap="gray")               # (H, W)
        row[2].imshow(heat.numpy(), vmin=0, vmax=1, alpha=0.55)
        for axis in row[:3]:
            axis.set_axis_off()
        row[3].bar_label(row[3].barh(range(3), p, tick_label=classes), fmt="%.3f", fontsize=8, padding=2)
        row[3].tick_params(labelsize=8)
        row[3].invert_yaxis()
        row[3].set(xlim=(0, 1.25), xticks=[0, 0.5, 1])
    for axis, title in zip(axes[0, 1:], ("saliency", "on gray image", "top 3 probabilities")):
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)
    print(f"saved {path}")


def plot_attacks(model, images, labels, names, args, path):
    """One row for each image: the image, then change and result of the sign step and of the scaled Jacobian."""
    results = list(all_attacks(model, images, labels, args.eps, args.attack_steps).items())[:2]
    figure, axes = plt.subplots(len(images), 5, figsize=(9, 2.2 * len(images)), squeeze=False, layout="constrained")
    for column, (name, result) in zip((0, 2, 4), [("", images), *results]):
        probabilities = predict(model, result).tolist()                     # (B, n_classes)
        change = ((result - images) / (2 * args.eps) + 0.5).clamp(0, 1)     # from [-eps, eps] to [0, 1]
        for row, x, d, p, label in zip(axes, result.cpu(), change.cpu(), probabilities, labels.tolist()):
            best = p.index(max(p))
            row[column].imshow(x.permute(1, 2, 0).numpy())
            row[column].set_title(f"{names[best]} {p[best]:.3f}", fontsize=9, color="black" if best == label else "red")
            if column:
                row[column - 1].imshow(d.permute(1, 2, 0).numpy())
                row[column - 1].set_title(f"change, {name}", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(f"eps = {255 * args.eps:.3g}/255, red: wrong. Change: black -eps, gray 0, white eps", fontsize=9)
    figure.savefig(path, dpi=100)
    print(f"saved {path}")


# ----------------------------------------------------------------------------------------------------------------------
# Photographs: URL, file, SHA-256

WEIGHTS = ("https://download.pytorch.org/models/resnet18-f37072fd.pth", "data/resnet18-f37072fd.pth",
           "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec")
NAMES = ("https://raw.githubusercontent.com/pytorch/hub/a6fc887fbbbda0dd37c440bf8a145f1da6707d6b/imagenet_classes.txt",
         "data/imagenet_classes.txt", "1f386e0d1cb6e28b9c2dac651c3dea6801e98ad1b41a14ce6bb1a093d72069f5")
PHOTOGRAPHS_URL = "https://raw.githubusercontent.com/EliSchwartz/imagenet-sample-images/master/"
PHOTOGRAPHS = [  # file, class, SHA-256
    ("n01534433_junco.JPEG", 13, "72d3955d40e0a4c0e948b34c8271de38f4922b22f7f50c7aae7e0dabe48c33b6"),
    ("n02102040_English_springer.JPEG", 217, "c3386e4f5277915b684195a6badcabf913f5e91c1a5f6bdea71aae40b5e335e6"),
    ("n02326432_hare.JPEG", 331, "8ef47acf3deec515ca8638578112f34a1814218e997ad7ce78eaafcf41aa993a"),
    ("n02480855_gorilla.JPEG", 366, "d6c3f329e35532dd262dd4bbf0088edc951ca9448e4ec2619efee7c552282256"),
    ("n01484850_great_white_shark.JPEG", 2, "2154d212dbb63a67f1436967223d846f687121cdd9ed1a37d6ca8f0821d385bc"),
    ("n01641577_bullfrog.JPEG", 30, "0f7055de76565e6f08ae8050b9ef56a7de6e65846e6aa67c47859134db40a72b"),
    ("n02056570_king_penguin.JPEG", 145, "76a03cbc599244b2d647b326ef80f2c53fa664c92779b693955187afebd7ee75"),
]


def read_image(path):
    """The image file as (3, 224, 224): shorter side resized to 256, then the central 224 x 224, as torchvision does."""
    try:
        pixels = torch.tensor(plt.imread(path))                             # (H, W), (H, W, 3) or (H, W, 4)
    except Exception:  # every image format raises its own
        sys.exit(f"cannot read {path}: no such file, or not an image")
    if pixels.dtype == torch.uint8:  # matplotlib returns PNG as floats in [0, 1], other formats as bytes
        pixels = pixels / 255
    if pixels.ndim == 2:  # grayscale
        pixels = pixels.unsqueeze(-1).expand(-1, -1, 3)                     # (H, W, 3)
    if pixels.size(-1) == 4:  # an alpha channel, on white
        pixels = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]    # (H, W, 3)
    size = [256 * side // min(pixels.shape[:2]) for side in pixels.shape[:2]]
    x = F.interpolate(pixels.permute(2, 0, 1).unsqueeze(0), size, mode="bilinear", antialias=True)
    top, left = (round((side - 224) / 2) for side in size)
    return x[0, :, top:top + 224, left:left + 224].clamp(0, 1)


def photographs(args):
    """Saliency and adversarial examples of photographs, with ResNet-18."""
    start = time.perf_counter()
    files = args.image or [f"data/{file}" for file, _, _ in PHOTOGRAPHS]
    if not args.image:
        for file, _, sha256 in PHOTOGRAPHS:
            download(PHOTOGRAPHS_URL + file, f"data/{file}", sha256)
    images = torch.stack([read_image(file) for file in files]).to(args.device)               # (B, 3, 224, 224)
    if args.weights == "imagenet":
        download(*WEIGHTS)
    model = resnet18().to(args.device)
    load_weights(model, WEIGHTS[1] if args.weights == "imagenet" else args.weights)
    download(*NAMES)
    with open(NAMES[1], encoding="utf-8") as file:
        names = file.read().splitlines()
    labels = torch.tensor([label for _, label, _ in PHOTOGRAPHS], device=args.device)        # (B,)
    if args.image:  # no labels here: use the predicted class, so accuracy is 1
        labels = predict(model, images).argmax(dim=1)
    titles = [os.path.basename(file) for file in files]
    plot_samples(model, images, labels, titles, names, f"{args.out_dir}/saliency_photographs.png")
    plot_attacks(model, images, labels, names, args, f"{args.out_dir}/saliency_photographs_adversarial.png")
    adversarial = adversarial_example(model, images, labels, args.eps, args.attack_steps)
    print(f"result: accuracy={accuracy_of(model, images, labels):.4f} "
          f"accuracy_attacked={accuracy_of(model, adversarial, labels):.4f} "
          f"params={sum(p.numel() for p in model.parameters())} seconds={time.perf_counter() - start:.1f}")


if __name__ == "__main__":
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--eps", type=positive(float), default=8 / 255, help="largest change of a pixel value")
    parser.add_argument("--attack_steps", type=positive(int), default=1, help="sign steps of an attack")
    parser.add_argument("--steps", type=positive(int), default=650, help="training steps")
    parser.add_argument("--batch_size", type=positive(int), default=64, help="images in each batch")
    parser.add_argument("--lr", type=positive(float), default=0.01, help="peak learning rate")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--load", metavar="FILE", help="weights of the small network: do not train")
    group.add_argument("--weights", metavar="imagenet|FILE", help="ResNet-18 with these weights, on photographs")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="with --weights: your own photographs")
    args = parse_args(parser)
    if args.image and not args.weights:
        parser.error("--image needs --weights: the small network is for 32 x 32 shapes")
    if args.weights:
        photographs(args)
        sys.exit()

    images, labels, masks = (t.to(args.device) for t in make_images(1000))  # to test on
    model = small_resnet(len(CLASSES)).to(args.device, memory_format=torch.channels_last)  # a fifth faster on a CPU
    _, untrained, chance = pointing_of(model, images, labels, masks)
    if not args.load:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.15,
                                                        cycle_momentum=False)
        model.train()
        for step in range(args.steps):
            x, y, _ = (t.to(args.device) for t in make_images(args.batch_size))
            loss = F.cross_entropy(model(x), y)
            if step == 0:
                print(f"step 0: loss {loss:.4f}, uniform prediction ln {len(CLASSES)} = {math.log(len(CLASSES)):.4f}")
            elif step % 50 == 0:
                print(f"step {step}: loss {loss:.4f}", flush=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        # Saved in half precision. All numbers below are those of the saved weights, as with --load.
        args.load = f"{args.out_dir}/saliency.pt"
        torch.save({name: value.half() for name, value in model.state_dict().items()}, args.load)
        print(f"saved {args.load}")
    load_weights(model, args.load)
    accuracy = accuracy_of(model, images, labels)
    on_shape, pointing, _ = pointing_of(model, images, labels, masks)
    print(f"1,000 new images: accuracy {accuracy:.4f}\nmost salient pixel: on the shape {on_shape:.4f}, within 2 "
          f"pixels {pointing:.4f} (untrained network {untrained:.4f}, random pixel {chance:.4f})")

    # Which change of the image fools the network?
    torch.manual_seed(args.seed)  # the same random signs with --load
    x, y = images[:500], labels[:500]                                       # B = 500
    gradient = calculate_jacobian(model, x, y)[0].flatten(1)                # (B, 3 * H * W)
    l1, l2, linf = gradient.abs().sum(dim=1), gradient.norm(dim=1), gradient.abs().amax(dim=1)  # (B,) each
    print(f"medians: L1 is {(l1 / l2).nanmedian():.1f} times L2 and {(l1 * linf / l2 ** 2).nanmedian():.1f} times "
          f"L2^2 / Linf\nlargest entry of the Jacobian: median {255 * linf.median():.2f}/255, maximum "
          f"{255 * linf.max():.0f}/255")
    print("accuracy  eps           sign step     scaled Jacobian   unscaled Jacobian        random signs")
    rows = []
    for eps in (2, 4, 8, 16):
        attacked = all_attacks(model, x, y, eps / 255, args.attack_steps)
        rows.append([accuracy_of(model, changed, y) for changed in attacked.values()])
        print(f"{eps:9}/255" + "".join(f"{value:20.4f}" for value in rows[-1]), flush=True)
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, values, style in zip(attacked, zip(*rows), ("o-", "s--", "x-.", "^:")):
        axis.plot([2, 4, 8, 16], values, style, label=name)
    axis.set(title="accuracy under attack", xlabel="eps * 255", xticks=[2, 4, 8, 16], ylim=(0, 1.05))
    axis.legend()
    figure.savefig(f"{args.out_dir}/saliency_accuracy.png", dpi=100)
    print(f"saved {args.out_dir}/saliency_accuracy.png")

    # Four images of different classes, and the first three that are fooled
    first = [y.tolist().index(c) for c in range(4)]
    plot_samples(model, x[first], y[first], CLASSES[:4], CLASSES, f"{args.out_dir}/saliency_samples.png")
    adversarial = adversarial_example(model, x, y, args.eps, args.attack_steps)
    fooled = (predict(model, x).argmax(dim=1) == y) & (predict(model, adversarial).argmax(dim=1) != y)
    chosen = fooled.int().argsort(descending=True, stable=True)[:3]
    plot_attacks(model, x[chosen], y[chosen], CLASSES, args, f"{args.out_dir}/saliency_adversarial.png")
    print(f"result: accuracy={accuracy:.4f} pointing={pointing:.4f} "
          f"accuracy_attacked={accuracy_of(model, adversarial, y):.4f} "
          f"params={sum(p.numel() for p in model.parameters())} seconds={time.perf_counter() - start:.1f}")
