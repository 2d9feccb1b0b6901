"""
Which pixels is a network without attention most sensitive to, and how can it be fooled?

The gradient of the loss with respect to an image shows, for every pixel, how much the loss changes
if the pixel changes a little. Where the gradient is large, the network is sensitive (saliency), and
a small step along its signs can fool the network (adversarial example). The gradient is a form of
implicit attention: translate.py compares it with attention weights where the right answer is known.

The script draws four simple shapes on cluttered backgrounds, and trains a small network to tell
them apart. So we know which pixels belong to the shape.

$ python saliency.py --load assets/saliency.pt      # trained weights: all results in seconds
$ python saliency.py                                # train first, in less than a minute
$ python saliency.py --weights imagenet             # seven photographs, downloads 48 MB
$ python saliency.py --weights imagenet --image a.jpg b.png         # your own photographs

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

from attention import download, parse_args, positive


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

    `target` (B,) holds the right classes. The model and x stay as they are.
    """
    x = x.detach().requires_grad_()
    logits = eval_logits(model, x)
    # Only one term of this sum depends on image i, its own loss. So the gradient of the sum with
    # respect to image i is that of its own loss.
    loss = cross_entropy(logits, target).sum()
    gradient = torch.autograd.grad(loss, x)[0]
    return gradient, logits.detach()


def eval_logits(model, x):
    """The logits (B, n_classes) in eval mode. The model keeps its mode.

    In training mode BatchNorm computes mean and variance from the batch, so images would influence
    each other. In eval mode it uses averages collected during training.
    """
    modes = [module.training for module in model.modules()]
    model.eval()
    logits = model(x)
    for module, training in zip(model.modules(), modes):
        module.training = training
    return logits


def cross_entropy(logits, target):
    """The loss -log p(target) of each image, (B,). Its gradient is accurate even if p is nearly 1.

    The gradient of F.cross_entropy contains p - 1, which float32 rounds to 0 if p is within 6e-8 of
    1. Let t be the target's logit, and S the sum of e^logit over the other classes. Then
    p = e^t / (e^t + S) = 1 / (1 + e^z) with z = log(S) - t, so the loss is log(1 + e^z): softplus.
    """
    is_target = F.one_hot(target, logits.size(1)).bool()                    # (B, n_classes)
    others = logits.masked_fill(is_target, -math.inf).logsumexp(dim=1)      # (B,)
    return F.softplus(others - logits[is_target])


# --------------------------------------------------------------------------------------------------
# Saliency: where does a small change matter most?
#
# The gradient has three numbers for each pixel, one for each color. Saliency is the length of this
# vector: it shows where a change matters, but not in which direction. (Simonyan et al. take the
# maximum over colors, and the gradient of the target's logit.)
def saliency_map(gradient):
    """Gradient (B, 3, H, W) -> saliency (B, H, W): L2 norm over colors, rescaled to [0, 1].

    0 is the least sensitive pixel of the image, not a pixel without influence.
    """
    norm = scale_to_1(gradient).norm(dim=1)                                 # (B, H, W)
    low = norm.amin(dim=(1, 2), keepdim=True)                               # (B, 1, 1)
    high = norm.amax(dim=(1, 2), keepdim=True)
    tiny = torch.finfo(norm.dtype).tiny     # a constant map becomes 0 / tiny instead of 0 / 0
    return (norm - low) / (high - low).clamp_min(tiny)


def scale_to_1(gradient):
    """Divide each image's gradient (B, 3, H, W) by its largest magnitude, which becomes 1.

    The gradient of a confident prediction can be 1e-30. Its square would be 0 in float32.
    """
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)              # (B, 1, 1, 1)
    tiny = torch.finfo(gradient.dtype).tiny
    return gradient / largest.clamp_min(tiny)


# --------------------------------------------------------------------------------------------------
# Adversarial examples: which small change matters most?
#
# To fool the network, change the image so that the loss increases, because then p(target)
# decreases. Let d be a change in which no value changes by more than eps. For a small eps, the loss
# increases by about sum(g * d), where g is the gradient. Each term g_i * d_i is largest if d_i is
# eps where g_i is positive, and -eps where it is negative. So the best change is eps times the
# *sign* of the gradient, whatever its size. This is the fast gradient sign method (FGSM).
#
# How small is small? The loss log(1 + e^z) (see cross_entropy) is curved, but z itself is nearly
# linear along this step, and its gradient has the same signs. At eps = 8/255, z increases from -7.8
# by 7.7, as the gradient predicts (medians of 500 images). The network can be wrong only where
# z > 0, that is p(target) < 1/2, and there it nearly always is. So this step fools almost half of
# the images.
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
# signs show what a change of the same size does without the gradient. With L1 = sum of |g|,
# L2 = sqrt(sum of g^2) and Linf = max |g|, the numbers 4.1, 3.34 and 3.16 are L1, L2^2 / Linf and
# L2.
#
# If all n values of g have the same magnitude a, then L1 is n * a and L2 is only sqrt(n) * a. In
# this best case, for n = 3,072, the sign step increases the loss sqrt(n) = 55 times as much as
# typical random signs: many changes that are too small to see add up. (The script measures 23,
# because far from the shape the gradient is small.)
def sign_step(x, gradient, eps):
    """Images in [0, 1], each value of x changed by eps so that the loss increases (FGSM)."""
    return (x + eps * gradient.sign()).clamp(0, 1)


def adversarial_example(model, x, target, eps, steps=1):
    """Images in [0, 1] within eps of x, after `steps` sign steps of eps / steps.

    Several small steps increase the loss further than one, because each uses the gradient at the
    place that it starts from (https://arxiv.org/abs/1607.02533).
    """
    adversarial = x.detach()
    for _ in range(steps):
        gradient, _ = calculate_jacobian(model, adversarial, target)
        adversarial = sign_step(adversarial, gradient, eps / steps)
    return adversarial


def all_attacks(x, gradient, eps):
    """Four attacks with the gradient at x, {name: images}. Only the unscaled one can exceed eps."""
    scaled = eps * scale_to_1(gradient)
    random = eps * torch.randn_like(x).sign()
    return {
        "sign step": sign_step(x, gradient, eps),
        "scaled Jacobian": (x + scaled).clamp(0, 1),
        "unscaled Jacobian": (x + gradient).clamp(0, 1),
        "random signs": (x + random).clamp(0, 1),
    }


# --------------------------------------------------------------------------------------------------
# The network
#
# A small ResNet (He et al. 2016, https://arxiv.org/abs/1512.03385). A convolution computes each
# output pixel from a 3 x 3 square of its input, with the same weights everywhere. It has many
# outputs for each pixel, the channels. With stride 2 it keeps every second row and column.
# BatchNorm brings each channel to mean 0 and variance 1, so that its scale does not depend on the
# layers before, and then to a learned mean and variance. A residual connection adds a block's input
# to its output, so that gradients get through deep networks.
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


def load_model(path):
    """The small network with weights that this script saved."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = small_resnet(*saved["sizes"])
        model.load_state_dict(saved["weights"])
        steps = saved["steps"]
    except Exception as error:                      # torch.load can fail in many ways
        sys.exit(f"cannot load {path} ({type(error).__name__}): "
                 "--load needs weights that saliency.py saved")
    print(f"weights from {path}, trained for {steps} steps", file=sys.stderr)
    return model


# --------------------------------------------------------------------------------------------------
# Images: how to draw with signed distances
#
# To draw a disc, compute for every pixel how far it is from the edge, with a minus sign inside:
# its distance to the center minus the radius. Paint the pixels where this signed distance is
# negative, and those at the edge in part, so that the edge is smooth. For a radius of 1.8, in a row
# of pixels through the center:
#
#     distance to the center     3     2     1     0     1     2     3
#     signed distance          1.2   0.2  -0.8  -1.8  -0.8   0.2   1.2
#     coverage                   0   0.3     1     1     1   0.3     0    0.5 - signed distance,
#                                                                         clamped to [0, 1]
#
# Two shapes with distances a and b give new ones:
#
#     a together with b          min(a, b)     negative where one of them is negative
#     where a and b overlap      max(a, b)     negative where both are negative
#     a without b                max(a, -b)    -b is negative outside b
#     the outline of a           |a| - w / 2   negative within w / 2 of the edge
#
# To move, rotate or enlarge a shape, keep its formula and change the coordinates. Each shape below
# is upright, has its center at u = v = 0, and reaches at most 1.2 from there. All functions draw n
# images at once, so a random number for each is a tensor (n, 1, 1).
SIZE = 32


def disc(u, v, radius):
    """Signed distance to a disc."""
    return torch.hypot(u, v) - radius


def box(u, v, half_width, half_height):
    """Signed distance to a rectangle. Beyond a corner it is too small, but still positive."""
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def cross(u, v):
    """A horizontal bar together with a vertical one."""
    horizontal = box(u, v, 0.95, 0.24)
    vertical = box(u, v, 0.24, 0.95)
    return torch.minimum(horizontal, vertical)


def triangle(u, v):
    """The outline of the triangle where three half-planes overlap."""
    bottom = v - 0.43                           # negative above the line v = 0.43: v points down
    left = -0.87 * u - 0.5 * v - 0.43           # the same, rotated by 120 degrees
    right = 0.87 * u - 0.5 * v - 0.43           # and by 240 degrees
    filled = torch.maximum(bottom, torch.maximum(left, right))
    return filled.abs() - 0.17


def bars(u, v):
    """Two bars, one above the other."""
    upper = box(u, v + 0.52, 0.8, 0.22)
    lower = box(u, v - 0.52, 0.8, 0.22)
    return torch.minimum(upper, lower)


def screw(u, v):
    """The head of a screw: a disc with a slot cut out."""
    slot = box(u, v, 1.0, 0.2)
    return torch.maximum(disc(u, v, 0.85), -slot)


SHAPES = [cross, triangle, bars, screw]
CLASSES = ["cross", "triangle", "bars", "screw"]


def offsets(center_x, center_y):
    """How far every pixel is from a center: to the right (n, 1, 32), and down (n, 32, 1)."""
    pixels = torch.arange(SIZE) + 0.5
    x = pixels.view(1, 1, SIZE) - center_x
    y = pixels.view(1, SIZE, 1) - center_y
    return x, y


def coordinates(center_x, center_y, angle):
    """The coordinates u and v of all pixels, (n, 32, 32), as seen from a rotated shape."""
    x, y = offsets(center_x, center_y)
    u = x * torch.cos(angle) + y * torch.sin(angle)
    v = y * torch.cos(angle) - x * torch.sin(angle)
    return u, v


def paint(images, color, distance, opacity=1.0):
    """Paint the color (n, 3, 1, 1) where the signed distance in pixels (n, 32, 32) is negative."""
    coverage = opacity * (0.5 - distance).clamp(0, 1)
    return images.lerp(color, coverage.unsqueeze(1))


def uniform(n, low, high):
    """A random number between low and high for each image, (n, 1, 1)."""
    return low + (high - low) * torch.rand(n, 1, 1)


def make_images(n, upright=False):
    """n random images (n, 3, 32, 32), labels (n,), and masks (n, 32, 32), True on the shape.

    With `upright`, every shape is in the center, not rotated, and as large as possible.
    """
    # Background: a random color, with six soft blobs of other colors
    images = torch.rand(n, 3, 1, 1).expand(n, 3, SIZE, SIZE)
    for _ in range(6):
        center_x = uniform(n, 0, SIZE)
        center_y = uniform(n, 0, SIZE)
        width = uniform(n, 2, 8)
        color = torch.rand(n, 3, 1, 1)
        x, y = offsets(center_x, center_y)
        distance = torch.hypot(x, y)                                        # (n, 32, 32)
        blob = torch.exp(-0.5 * (distance / width) ** 2)                    # 1 at the center
        images = images.lerp(color, blob.unsqueeze(1))

    # In each color channel, the shape is bright (0.75 to 1) on a darker background (0 to 0.55), or
    # dark (0 to 0.25) on a brighter one (0.45 to 1).
    bright = torch.randint(2, (n, 3, 1, 1))
    images = 0.55 * images + 0.45 * (1 - bright)
    color = 0.75 * bright + 0.25 * torch.rand(n, 3, 1, 1)

    # Four faint strokes of the same color, as a distraction
    for _ in range(4):
        center_x = uniform(n, 0, SIZE)
        center_y = uniform(n, 0, SIZE)
        angle = uniform(n, 0, math.pi)
        u, v = coordinates(center_x, center_y, angle)
        half_length = uniform(n, 0.5, 3)
        half_width = uniform(n, 0.4, 0.8)
        distance = box(u, v, half_length, half_width)
        images = paint(images, color, distance, opacity=0.3)

    # The shape
    radius = uniform(n, 6.5, 9)
    center_x = uniform(n, 9, SIZE - 9)
    center_y = uniform(n, 9, SIZE - 9)
    angle = uniform(n, 0, 2 * math.pi)
    if upright:
        radius.fill_(9)
        center_x.fill_(SIZE / 2)
        center_y.fill_(SIZE / 2)
        angle.fill_(0)
    u, v = coordinates(center_x, center_y, angle)
    u = u / radius
    v = v / radius
    labels = torch.randint(len(CLASSES), (n,))
    distance = torch.empty(n, SIZE, SIZE)
    for c, shape in enumerate(SHAPES):
        of_class = labels == c
        distance[of_class] = shape(u[of_class], v[of_class])
    distance = distance * radius                                            # in pixels
    images = paint(images, color, distance)

    noise = 0.02 * torch.randn(images.shape)
    images = (images + noise).clamp(0, 1)
    return images, labels, distance < 0


# --------------------------------------------------------------------------------------------------
# What is measured (1): does saliency point at the shape?
#
# Pointing is how often the most salient pixel is at most two pixels away from the shape. It means
# little without a comparison:
#
# - Trained network. The most salient pixel is nearly always within two pixels of the shape, but on
#   it only half of the time. Nearly all others are in the gaps of the shape (inside the triangle,
#   in the slot of the screw, in the notches of the cross). Saliency shows where a *change* matters,
#   and in the gaps it is at least as large as on the shape: painting the slot of the screw would
#   make it a disc. Near the shape but outside, it is at most about half as large.
# - Middle pixel. All shapes are near the middle of the image, so this constant answer is right in
#   93% of the images. The last column takes this into account. It compares the same maps with the
#   shape of another image, which they should not find.
# - Untrained network. It has learned nothing, yet its maps point at the image's own shape more
#   often than at another's. Where an image is flat, the same ReLUs are active everywhere, and the
#   map repeats one pattern every four pixels (two blocks with stride 2). At an edge other ReLUs are
#   active, so the pattern changes, and the shape has the sharpest edges. The gradient is no larger
#   there on average (1.01 times, measured with twelve networks), but it varies 1.4 times as much
#   from pixel to pixel, so its largest value is often there. A map that shows the object therefore
#   does not prove that the network has learned anything (Adebayo et al. 2018, "Sanity Checks for
#   Saliency Maps", https://arxiv.org/abs/1810.03292).
# - Edge detector. It cannot tell the classes apart, and is always within two pixels. (It is on the
#   shape half of the time, because an edge has two sides.) So pointing measures whether a map finds
#   the object, and not whether it explains the decision.
# - Random pixel: chance.
@torch.no_grad()
def predict(model, images):
    """Probabilities (B, n_classes)."""
    return eval_logits(model, images).softmax(dim=1)


def is_correct(model, images, labels):
    """Whether the most probable class of each image is its label, (B,)."""
    return predict(model, images).argmax(dim=1) == labels


def accuracy_of(model, images, labels):
    """Fraction of the images whose most probable class is the label."""
    return is_correct(model, images, labels).float().mean().item()


def within_two_pixels(masks):
    """Masks (B, H, W) that are 1 at most two pixels from the shape, diagonally too, else 0."""
    # the maximum over the 5 x 5 square around each pixel
    return F.max_pool2d(masks.float(), kernel_size=5, stride=1, padding=2)


def pointing_of(saliency, masks):
    """How often the most salient pixel is on the shape, and within two pixels of it."""
    best = saliency.flatten(1).argmax(dim=1, keepdim=True)                  # (B, 1)
    on_shape = masks.float().flatten(1).gather(1, best)
    near_shape = within_two_pixels(masks).flatten(1).gather(1, best)
    return on_shape.mean().item(), near_shape.mean().item()


def edge_map(images):
    """How fast the colors change at each pixel, (B, H, W): an edge detector."""
    vertical, horizontal = torch.gradient(images, dim=(2, 3))               # (B, 3, H, W) each
    return torch.hypot(vertical, horizontal).norm(dim=1)


def measure_pointing(gradient, gradient_untrained, images, masks):
    """Print the table, and return it as a dict of rows.

    The columns: on the shape, within two pixels of it, within two pixels of another image's shape.
    """
    middle = torch.zeros(masks.shape, device=masks.device)
    middle[:, SIZE // 2, SIZE // 2] = 1
    maps = {
        "trained network": saliency_map(gradient),
        "untrained network": saliency_map(gradient_untrained),
        "edge detector": edge_map(images),
        "middle pixel": middle,
    }
    other_masks = masks.roll(1, dims=0)
    table = {}
    for name, saliency in maps.items():
        on_shape, near_shape = pointing_of(saliency, masks)
        _, near_other_shape = pointing_of(saliency, other_masks)
        table[name] = (on_shape, near_shape, near_other_shape)
    chance_on_shape = masks.float().mean().item()
    chance_near_shape = within_two_pixels(masks).mean().item()
    table["random pixel"] = (chance_on_shape, chance_near_shape, chance_near_shape)
    print("most salient pixel    on the shape    within 2 pixels    of another shape")
    for name, (on_shape, near_shape, near_other_shape) in table.items():
        print(f"{name:18}{on_shape:16.4f}{near_shape:19.4f}{near_other_shape:20.4f}")
    return table


# --------------------------------------------------------------------------------------------------
# What is measured (2): which change of the image fools the network?
#
# Two results need an explanation:
#
# - The unscaled Jacobian, the gradient added as it is, fools the same few images at every eps. Its
#   size does not depend on eps but on the confidence of the network: the loss is log(1 + e^z) (see
#   cross_entropy), and its derivative with respect to z is e^z / (1 + e^z) = 1 - p(target), a
#   factor of every entry. Where the network is confidently right, the largest entry is usually
#   below 1/255, too small to matter. Where it is less confident, the entries are many times larger,
#   and less is needed to fool it.
# - At eps = 16/255 random signs fool a tenth of the images, more than the scaled Jacobian. To first
#   order the opposite signs would decrease the loss, but here they usually increase it, too. So
#   even z is far from linear for such noise, which is three times as strong as the noise in the
#   training images (0.02, about 5/255).
EPS = [2, 4, 8, 16]  # in units of 1/255


def measure_norms(gradient):
    """Print and return the medians of L1 / L2 and of L1 * Linf / L2^2."""
    # These ratios do not depend on the scale. After scale_to_1, Linf is 1.
    scaled = scale_to_1(gradient).flatten(1)                                # (B, 3 * H * W)
    l1 = scaled.abs().sum(dim=1)                                            # (B,)
    l2 = scaled.norm(dim=1)
    to_random = (l1 / l2).median().item()
    to_scaled = (l1 / l2 ** 2).median().item()
    print("how much the sign step increases the loss, to first order (medians):")
    print(f"{to_random:.1f} times as much as random signs, "
          f"{to_scaled:.1f} times as much as the scaled Jacobian")
    return to_random, to_scaled


def measure_unscaled(model, images, labels, gradient):
    """Print and return the median of the largest entry of the unscaled Jacobian, times 255.

    Two medians: over the images that the network gets right after the attack, and over the others.
    """
    largest = 255 * gradient.abs().amax(dim=(1, 2, 3))                      # (B,)
    attacked = (images + gradient).clamp(0, 1)
    correct = is_correct(model, attacked, labels)
    harmless = largest[correct].median().item()
    fooling = largest[~correct].median().item()
    print("largest entry of the unscaled Jacobian (medians):")
    print(f"{harmless:.2f}/255 where the network stays right, {fooling:.2f}/255 where it is wrong")
    return harmless, fooling


def compare_attacks(model, images, labels, gradient):
    """Print the accuracy under each attack for each eps; return it as {name: [accuracy, ...]}."""
    names = ["sign step", "scaled Jacobian", "unscaled Jacobian", "random signs"]
    table = {name: [] for name in names}
    print("accuracy eps", end="")
    for name in names:
        print(f"{name:>19}", end="")
    print()
    for eps in EPS:
        attacks = all_attacks(images, gradient, eps / 255)
        print(f"{eps:8}/255", end="")
        for name in names:
            accuracy = accuracy_of(model, attacks[name], labels)
            table[name].append(accuracy)
            print(f"{accuracy:19.4f}", end="")
        print(flush=True)
    return table


# --------------------------------------------------------------------------------------------------
# Figures
def _show(axis, image, title, **options):
    """Draw an image (3, H, W) or a map (H, W)."""
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
    axis.imshow(image.cpu().numpy(), **options)
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_axis_off()


def _save(figure, path):
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


def plot_samples(model, images, labels, titles, names, path):
    """A row for each image: the image, its saliency, both, and the three most probable classes."""
    gradient, _ = calculate_jacobian(model, images, labels)
    saliency = saliency_map(gradient).cpu()
    top = predict(model, images).topk(3, dim=1)
    n = len(images)
    figure, axes = plt.subplots(n, 4, figsize=(9, 2.2 * n), squeeze=False, layout="constrained")
    for i in range(n):
        _show(axes[i, 0], images[i], titles[i])
        _show(axes[i, 1], saliency[i], "saliency", vmin=0, vmax=1)

        # saliency on the gray image, transparent where it is 0
        gray = images[i].mean(dim=0)
        opacity = saliency[i].numpy()
        _show(axes[i, 2], gray, "", vmin=0, vmax=1, cmap="gray")
        _show(axes[i, 2], saliency[i], "most salient pixel", cmap="autumn", alpha=opacity)
        best = saliency[i].argmax().item()
        row = best // saliency.size(2)
        column = best % saliency.size(2)
        axes[i, 2].scatter(column, row, s=60, facecolors="none", edgecolors="cyan")

        classes = [names[c] for c in top.indices[i].tolist()]
        probabilities = top.values[i].tolist()
        container = axes[i, 3].barh([2, 1, 0], probabilities, tick_label=classes)
        axes[i, 3].bar_label(container, fmt="%.3f", fontsize=8, padding=2)
        axes[i, 3].set_title("probability", fontsize=8)
        axes[i, 3].set(xlim=(0, 1.3), xticks=[0, 0.5, 1])
        axes[i, 3].tick_params(labelsize=8)

        print(f"{titles[i]}:", end="")
        for name, probability in zip(classes, probabilities):
            print(f" {name} {probability:.3f}", end="")
        print()
    _save(figure, path)


def plot_mean_saliency(model, untrained, device, path):
    """The mean saliency map of each class, before and after training, for upright shapes."""
    images, labels, masks = make_images(200, upright=True)
    figure, axes = plt.subplots(2, len(CLASSES), figsize=(9, 4.8), layout="constrained")
    for row, network, title in [(0, model, "trained"), (1, untrained, "untrained")]:
        gradient, _ = calculate_jacobian(network, images.to(device), labels.to(device))
        saliency = saliency_map(gradient).cpu()
        for c, axis in enumerate(axes[row]):
            of_class = labels == c
            mean = saliency[of_class].mean(dim=0)
            _show(axis, mean, f"{CLASSES[c]}, {title}")
            mask = masks[of_class][0].float().numpy()   # all masks of a class are equal
            axis.contour(mask, levels=[0.5], colors="white", linewidths=0.8)
    _save(figure, path)


def plot_attacks(model, images, labels, names, eps, steps, path):
    """A row for each image: the image, then change and result of two attacks."""
    gradient, _ = calculate_jacobian(model, images, labels)
    attacks = all_attacks(images, gradient, eps)
    attacks["sign step"] = adversarial_example(model, images, labels, eps, steps)
    n = len(images)
    figure, axes = plt.subplots(n, 5, figsize=(9, 2.2 * n), squeeze=False, layout="constrained")
    _show_predictions(axes[:, 0], model, images, labels, names)
    for column, name in [(1, "sign step"), (3, "scaled Jacobian")]:
        attacked = attacks[name]
        change = (attacked - images) / (2 * eps) + 0.5          # [-eps, eps] to [0, 1]
        for axis, image in zip(axes[:, column], change.clamp(0, 1)):
            _show(axis, image, f"change, {name}")
        _show_predictions(axes[:, column + 1], model, attacked, labels, names)
    figure.suptitle(f"eps = {255 * eps:.3g}/255. Red: wrong. "
                    "Change: black is -eps, gray is 0, white is eps", fontsize=9)
    _save(figure, path)


def _show_predictions(axes, model, images, labels, names):
    """An image on each axis. The title is the most probable class, in red if it is wrong."""
    best = predict(model, images).max(dim=1)
    for i, axis in enumerate(axes):
        label = best.indices[i].item()
        probability = best.values[i].item()
        _show(axis, images[i], f"{names[label]} {probability:.3f}")
        if label != labels[i]:
            axis.title.set_color("red")


# --------------------------------------------------------------------------------------------------
# Appendix (skip it on a first reading): photographs and ResNet-18
#
# This part draws samples and adversarial examples for photographs, with a ResNet-18 trained on
# ImageNet. The attributes have torchvision's names, so that torchvision's weights load. The trained
# weights could not be downloaded so far, so these figures are unchecked.
class ResNet(nn.Module):
    """ResNet-18: (B, 3, 224, 224) -> logits (B, n_classes)."""

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


def resnet18(num_classes=1000):
    """As `torchvision.models.resnet18`: 11,689,512 parameters for 1,000 classes."""
    return ResNet(num_classes)


def load_resnet18(path):
    """ResNet-18 with torchvision's weights."""
    model = resnet18()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as error:
        sys.exit(f"cannot load {path} ({type(error).__name__}): --weights needs a file with a "
                 "plain state_dict of torchvision's resnet18 for 1,000 classes")
    print(f"weights from {path}", file=sys.stderr)
    return model


def read_image(path):
    """The image in a file as (3, 224, 224), prepared as torchvision does for its ResNet-18.

    The shorter side becomes 256 pixels, then the center is kept. EXIF rotation is ignored.
    """
    try:
        # With a format that is not "png", matplotlib lets Pillow look at the content.
        pixels = plt.imread(path, format="any")     # (H, W), (H, W, 3) or (H, W, 4)
    except Exception:                               # every format raises its own errors
        sys.exit(f"cannot read {path}: no such file, or not an image")
    # PNG files arrive as floats, others as integers of 8 or 16 bits
    white = {"uint8": 255, "uint16": 65535}.get(pixels.dtype.name, 1)
    pixels = torch.tensor(pixels.astype("float32")) / white
    if pixels.ndim == 2:                            # gray: the same value for three colors
        pixels = pixels.unsqueeze(2).expand(-1, -1, 3)
    if pixels.size(2) == 4:                         # an alpha channel: put it on white
        alpha = pixels[:, :, 3:]
        pixels = pixels[:, :, :3] * alpha + 1 - alpha

    height, width, _ = pixels.shape
    shorter = min(height, width)
    height = 256 * height // shorter
    width = 256 * width // shorter
    x = pixels.permute(2, 0, 1).unsqueeze(0)        # (1, 3, H, W)
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
    top = round((height - 224) / 2)
    left = round((width - 224) / 2)
    x = x[0, :, top:top + 224, left:left + 224]
    return x.clamp(0, 1)


WEIGHTS = (  # address, file, SHA-256
    "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "data/resnet18-f37072fd.pth",
    "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
)
NAMES = (
    "https://raw.githubusercontent.com/pytorch/hub/"
    "a6fc887fbbbda0dd37c440bf8a145f1da6707d6b/imagenet_classes.txt",
    "data/imagenet_classes.txt",
    "1f386e0d1cb6e28b9c2dac651c3dea6801e98ad1b41a14ce6bb1a093d72069f5",
)
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
    ("n01484850_great_white_shark.JPEG", 2,
     "2154d212dbb63a67f1436967223d846f687121cdd9ed1a37d6ca8f0821d385bc"),
    ("n01641577_bullfrog.JPEG", 30,
     "0f7055de76565e6f08ae8050b9ef56a7de6e65846e6aa67c47859134db40a72b"),
    ("n02056570_king_penguin.JPEG", 145,
     "76a03cbc599244b2d647b326ef80f2c53fa664c92779b693955187afebd7ee75"),
]


def photographs(args):
    """Draw two figures for args.image, or else for PHOTOGRAPHS. Return the results as text."""
    files = args.image
    if not files:
        files = []
        for name, _, sha256 in PHOTOGRAPHS:
            download(PHOTOGRAPHS_URL + name, f"data/{name}", sha256)
            files.append(f"data/{name}")
    images = torch.stack([read_image(file) for file in files])
    images = images.to(args.device)

    path = args.weights
    if path == "imagenet":
        download(*WEIGHTS)
        path = WEIGHTS[1]
    model = load_resnet18(path).to(args.device)
    download(*NAMES)
    with open(NAMES[1], encoding="utf-8") as file:
        names = file.read().splitlines()

    # Your own photographs have no labels: take the predicted class, so that accuracy is 1.
    if args.image:
        labels = predict(model, images).argmax(dim=1)
    else:
        labels = torch.tensor([label for _, label, _ in PHOTOGRAPHS], device=args.device)
    titles = [os.path.basename(file) for file in files]
    path = os.path.join(args.out_dir, "saliency_photographs.png")
    plot_samples(model, images, labels, titles, names, path)
    path = os.path.join(args.out_dir, "saliency_photographs_adversarial.png")
    plot_attacks(model, images, labels, names, args.eps, args.attack_steps, path)

    adversarial = adversarial_example(model, images, labels, args.eps, args.attack_steps)
    accuracy = accuracy_of(model, images, labels)
    accuracy_attacked = accuracy_of(model, adversarial, labels)
    n_params = sum(p.numel() for p in model.parameters())
    return (f"accuracy={accuracy:.4f} accuracy_attacked={accuracy_attacked:.4f} "
            f"params={n_params}")


if __name__ == "__main__":
    start = time.perf_counter()

    # options
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--eps", type=positive(float), default=8 / 255,
                        help="largest change of a pixel value, for the figure and the result")
    parser.add_argument("--attack_steps", type=positive(int), default=1,
                        help="sign steps of the attack, for the figure and the result")
    parser.add_argument("--steps", type=positive(int), default=650, help="training steps")
    parser.add_argument("--batch_size", type=positive(int), default=64,
                        help="images in each batch")
    parser.add_argument("--lr", type=positive(float), default=0.01, help="peak learning rate")
    parser.add_argument("--n_images", type=positive(int), default=1000,
                        help="images for the evaluation; half of them are attacked")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--load", metavar="FILE", help="weights of the small network: do not train")
    group.add_argument("--weights", metavar="imagenet|FILE",
                       help="ResNet-18 with these weights, on photographs")
    parser.add_argument("--image", nargs="+", metavar="FILE",
                        help="with --weights: your own photographs")
    args = parse_args(parser)
    if args.image and not args.weights:
        parser.error("--image needs --weights: the small network is for 32 x 32 shapes")
    if args.weights:
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
    # channels_last is a memory layout that makes convolutions on a CPU a fifth faster.
    model = small_resnet(len(CLASSES)).to(args.device, memory_format=torch.channels_last)
    untrained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps,
                                                    pct_start=0.15, cycle_momentum=False)

    # training loop, or trained weights
    if args.load:
        model = load_model(args.load).to(args.device, memory_format=torch.channels_last)
    else:
        model.train()
        for step in range(args.steps):
            # get a batch
            x, y, _ = make_images(args.batch_size)
            x = x.to(args.device)
            y = y.to(args.device)

            # forward
            logits = model(x)
            loss = F.cross_entropy(logits, y)

            # backward, update
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

            # log; the first loss is not quite ln 4, because the initial logits are not 0
            if step == 0:
                print(f"step 0/{args.steps}: loss {loss:.4f}, "
                      f"uniform prediction ln {len(CLASSES)} = {math.log(len(CLASSES)):.4f}")
            if (step + 1) % 50 == 0:
                print(f"step {step + 1}/{args.steps}: loss {loss:.4f}", flush=True)

        path = os.path.join(args.out_dir, "saliency.pt")
        sizes = [len(CLASSES)]
        saved = {"sizes": sizes, "steps": args.steps, "weights": model.state_dict()}
        torch.save(saved, path)
        print(f"saved {path}")

    # evaluation
    accuracy = accuracy_of(model, images, labels)
    print(f"{args.n_images:,} new images: accuracy {accuracy:.4f}\n")
    gradient, _ = calculate_jacobian(model, images, labels)
    gradient_untrained, _ = calculate_jacobian(untrained, images, labels)
    table = measure_pointing(gradient, gradient_untrained, images, masks)
    _, pointing, _ = table["trained network"]
    print()
    torch.manual_seed(args.seed)            # the same random signs after training and with --load
    n_attacked = (args.n_images + 1) // 2
    x = images[:n_attacked]
    y = labels[:n_attacked]
    gradient = gradient[:n_attacked]
    measure_norms(gradient)
    measure_unscaled(model, x, y, gradient)
    compare_attacks(model, x, y, gradient)
    adversarial = adversarial_example(model, x, y, args.eps, args.attack_steps)
    accuracy_attacked = accuracy_of(model, adversarial, y)
    print()

    # figures
    first = []
    for c in range(len(CLASSES)):
        of_class = (y == c).nonzero().flatten().tolist()
        first += of_class[:1]
    titles = [CLASSES[c] for c in y[first].tolist()]
    path = os.path.join(args.out_dir, "saliency_samples.png")
    plot_samples(model, x[first], y[first], titles, CLASSES, path)
    path = os.path.join(args.out_dir, "saliency_mean.png")
    plot_mean_saliency(model, untrained, args.device, path)
    fooled = is_correct(model, x, y) & ~is_correct(model, adversarial, y)   # (B,)
    chosen = fooled.int().argsort(descending=True, stable=True)[:3]         # True before False
    path = os.path.join(args.out_dir, "saliency_adversarial.png")
    plot_attacks(model, x[chosen], y[chosen], CLASSES, args.eps, args.attack_steps, path)
    n_params = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - start
    print(f"result: accuracy={accuracy:.4f} pointing={pointing:.4f} "
          f"accuracy_attacked={accuracy_attacked:.4f} params={n_params} seconds={seconds:.1f}")
