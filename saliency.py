"""Where does a network *without* attention look, and how is it fooled?
A convolutional network has no attention weights to print. But it is differentiable, so it can be asked how much its
loss would change with every number of the picture: that is its Jacobian with respect to the input, or simply the
gradient, as the loss is one number. Where it is large, a small change would matter most (saliency: one is tempted to
say that the network looks there, and README shows where that goes wrong); and a small step that follows its signs,
too small to be noticed, makes the network wrong (an adversarial example).

Both need a trained network and pictures. By default the program draws its own pictures, six shapes on cluttered
backgrounds, and trains a small ResNet on them in about a minute. As it knows where it put each shape, it can also
measure how often the most salient pixel lies on it. With one more option it does the same on real photographs, with the
ResNet-18 that was trained on ImageNet.

    python saliency.py                                 train, then look at four pictures and attack three
    python saliency.py --load out/saliency.pt          the same without the training
    python saliency.py --weights imagenet              seven photographs, fetched with the weights (48 MB in all)
    python saliency.py --weights imagenet --image a.jpg b.png        your own

You will see the loss start near ln 6 and the accuracy on fresh pictures pass 0.99, and three figures in out/: four
samples with their saliency, three adversarial examples, and the accuracy against the size of the attack.

Why does a change of 8/255 in each number suffice, when noise of the same size does nothing? Let g be the gradient of
the loss. If the loss were a straight line (to first order), a change d would add the sum of g * d to it. It is not: for
a sure prediction it is flat here and steep further on, so it rises more than that. But the comparison holds. If no
number may change by more than eps,

    sign step      d = eps * sign(g)          adds  eps * L1              L1 = sum of |g|
    raw step       d = eps * g / max|g|       adds  eps * L2^2 / Linf     L2 = root of the sum of g^2, Linf = max|g|
    random signs   d = eps * (1 or -1)        adds  0 on average, give or take eps * L2 (standard deviation)

and L1 >= L2^2 / Linf >= L2, whatever g is. The sign step is the best there is, as it uses the whole allowance
everywhere. The raw step uses it in one place only, where g is largest. Random signs help as often as they hurt. If all
n numbers of g were of one size, L1 would be sqrt(n) times L2: the more pixels, the further noise is left behind.

Simonyan, Vedaldi and Zisserman 2014, "Deep Inside Convolutional Networks" (https://arxiv.org/abs/1312.6034), saliency.
Goodfellow, Shlens and Szegedy 2015, "Explaining and Harnessing Adversarial Examples", section 4, the sign step
(https://arxiv.org/abs/1412.6572). He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", the
network (https://arxiv.org/abs/1512.03385).
"""

import math
import os
import pathlib
import warnings

import matplotlib.image
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from attention import check_finite, download, fail, load, make_parser, number, print_first_loss, print_result, \
    progress, run, save_figure, save_weights, start

# ----------------------------------------------------------------------------------------------------------------------
# The idea: where does it look, and how is it fooled? B pictures of three colours, H x W pixels, numbers in [0, 1].


def calculate_jacobian(model, x, target):
    """How the loss depends on pictures x (B, 3, H, W): returns its gradient (B, 3, H, W) and the logits (B, n_classes).

    The loss is the cross-entropy with `target` (B,), summed over the pictures and not averaged, so that the gradient of
    each is the same alone and in a batch. In eval mode, for the same reason: BatchNorm, which rescales each channel by
    its mean and spread, takes these from all pictures of a batch in training, from numbers it has kept in eval mode.
    The model, its mode, its gradients and x are left as they were.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():              # whatever the caller has switched off
            x = x.detach().clone().requires_grad_()                         # (B, 3, H, W)
            logits = model(x)                                               # (B, n_classes)
            # With respect to the target's logit the gradient is p - 1. If the prediction is sure by more than 16,
            # float32 rounds p to 1 and this is lost; float64 holds out to 36. On the CPU: not every GPU has float64.
            loss = F.cross_entropy(logits.cpu().double(), target.cpu(), reduction="sum")
            gradient, = torch.autograd.grad(loss, x)                        # (B, 3, H, W); touches no parameter's .grad
    finally:
        for module, mode in modes.items():
            module.training = mode
    return gradient, logits.detach()


def saliency_map(gradient):
    """Gradient (B, 3, H, W) -> saliency (B, H, W): L2 norm over the colours, rescaled to [0, 1] for each picture.

    If the norm is the same at every pixel, no pixel is salient: all zeros.
    """
    red, green, blue = gradient.unbind(dim=1)                               # (B, H, W) each
    norm = torch.hypot(torch.hypot(red, green), blue)                       # (B, H, W) also where a square would be 0
    low, high = norm.amin(dim=(1, 2), keepdim=True), norm.amax(dim=(1, 2), keepdim=True)  # (B, 1, 1)
    return (norm - low) / (high - low).clamp_min(torch.finfo(norm.dtype).tiny)            # (B, H, W)


def adversarial_example(model, x, target, eps, steps=1):
    """Pictures (B, 3, H, W) at most eps from x and in [0, 1], after `steps` sign steps up the loss, eps / steps each.

    One step is the fast gradient sign method (Goodfellow et al. 2015, section 4). Several small ones, which together
    lead no further than eps, look at the gradient anew each time and so follow a loss that is not straight.
    """
    adversarial = x.detach()                                                # (B, 3, H, W)
    for _ in range(steps):
        gradient, _ = calculate_jacobian(model, adversarial, target)        # (B, 3, H, W)
        adversarial = (adversarial + eps / steps * gradient.sign()).clamp(0, 1)
    return adversarial


def raw_step(model, x, target, eps):
    """The obvious thing to try first: one step along the gradient itself, scaled so that its largest change is eps."""
    gradient, _ = calculate_jacobian(model, x, target)
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)              # (B, 1, 1, 1)
    return (x.detach() + eps * gradient / largest.clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The network, with the names and shapes of torchvision's ResNet-18, so that its weights load
#
# A convolution is a linear layer over a small window, here 3 x 3 pixels, that slides over the picture. Stride 2 moves
# it by two pixels at a time, which halves height and width. Channels are the features that it computes at each place.


class BasicBlock(nn.Module):
    """Two convolutions, their result added to the input: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride).

    He et al. 2016, figure 2. Where the shape changes, a 1 x 1 convolution brings the input to it (section 3.3).
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))                                 # (B, c_out, H / stride, W / stride)
        y = self.bn2(self.conv2(y))                                         # (B, c_out, H / stride, W / stride)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Pictures (B, 3, H, W) with numbers in [0, 1] -> logits (B, n_classes).

    `blocks` and `widths`: how many blocks each layer (torchvision's word for a group of blocks) has, and how many
    channels. Each layer but the first halves height and width. A stem of 7 begins with a 7 x 7 convolution and a
    pooling that quarter them, for photographs; a stem of 3 with a 3 x 3 convolution that keeps every pixel, for small
    pictures.
    """

    def __init__(self, blocks, widths, n_classes, stem=7):
        super().__init__()
        # The normalisation belongs to the network: outside, a pixel is three numbers in [0, 1], eps a change of them.
        # Mean and spread are those of ImageNet's colours. Not persistent: left out of the state_dict, the table of all
        # weights by name, since torchvision's has no such entries.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, widths[0], stem, 2 if stem == 7 else 1, padding=stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == 7 else nn.Identity()
        self.n_layers, c_in = len(widths), widths[0]
        for n, (n_blocks, width) in enumerate(zip(blocks, widths), start=1):
            layer = nn.Sequential()
            for i in range(n_blocks):
                layer.append(BasicBlock(c_in, width, stride=2 if n > 1 and i == 0 else 1))
                c_in = width
            setattr(self, f"layer{n}", layer)                               # torchvision's names: layer1, layer2, ...
        self.fc = nn.Linear(c_in, n_classes)

    def forward(self, x):
        x = (x - self.mean) / self.std                                      # (B, 3, H, W)
        # with a stem of 7; a stem of 3 leaves all of them four times as high and wide
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))                   # (B, widths[0], H / 4, W / 4)
        for n in range(1, self.n_layers + 1):
            x = getattr(self, f"layer{n}")(x)                               # (B, widths[n-1], H / 2^(n+1), W / 2^(n+1))
        return self.fc(x.mean(dim=(2, 3)))                                  # (B, n_classes)


def resnet18(num_classes=1000):
    """The ResNet-18 of He et al. 2016, table 1: 11,689,512 parameters with 1,000 classes."""
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), num_classes)


def small_resnet():
    """The network of the default run: one block in each of three layers, 77,782 parameters."""
    return ResNet((1, 1, 1), (16, 32, 64), len(CLASSES), stem=3)


def fill(model, weights, path):
    """Copy a state_dict into the model; `path` is for the message if it does not fit."""
    try:
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        fail(f"{path} does not fit this network: {' '.join(str(error).split())[:250]}")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures to train on: one of six shapes, of any place, size, angle and colour, on a cluttered background

CLASSES = ["star", "ring", "cross", "triangle", "bars", "moon"]
SIZE = 32
N_FRESH, N_ATTACKED = 2000, 500     # pictures to measure accuracy and pointing on; the first 500 are attacked as well


def shape_distances(u, v):
    """About how far the points (u, v) are outside each shape, below 0 inside: both (B, H, W) -> (B, 6, H, W).

    The shapes lie around (0, 0) within a radius of 1, but for tips and corners (star 1.26, triangle 1.20, bars 1.09),
    which may so stick out of a picture.
    """
    def polygon(n, sides, inner):
        """How far outside the area inside at least `sides` of n lines, `inner` from the centre. A star: 4 of 5."""
        angles = torch.arange(n) * (2 * math.pi / n)                        # (n,)
        outside = u.unsqueeze(-1) * angles.cos() + v.unsqueeze(-1) * angles.sin() - inner  # (B, H, W, n) of each line
        return outside.kthvalue(sides, dim=-1).values                       # (B, H, W)

    r, small, large = torch.hypot(u, v), torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    return torch.stack([polygon(5, 4, 0.39),
                        (r - 0.72).abs() - 0.22,                            # ring: near a circle
                        torch.maximum(small - 0.24, large - 0.95),          # cross: one coordinate small
                        (polygon(3, 3, 0.60) + 0.17).abs() - 0.17,          # triangle: near three sides
                        torch.maximum((v.abs() - 0.52).abs() - 0.22, u.abs() - 0.80),       # bars: an equals sign
                        torch.maximum(r - 0.95, 0.75 - torch.hypot(u - 0.5, v))], dim=1)  # moon: a disc without a disc


def make_pictures(n_samples, generator):
    """Pictures (B, 3, 32, 32), their classes (B,), and masks (B, 32, 32) that are True on the shape; B = n_samples.

    A coin decides for each of the three colours: either the shape has at least 0.75 of it and the background at most
    0.55, or the shape at most 0.25 and the background at least 0.45 (but for four short strokes and the noise). So no
    shape is ever lost in its background.
    """
    def uniform(low, high, n):
        """Random numbers for each picture, (B, n, 1, 1): one for a size or an angle, 3 for a colour, 4 for strokes."""
        return low + (high - low) * torch.rand(n_samples, n, 1, 1, generator=generator)

    def paint(picture, color, cover):
        """Blend a colour (B, 3, 1, 1) into the picture (B, 3, H, W) as much as `cover` (B, 1, H, W) says."""
        return picture + (color - picture) * cover

    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")  # (H, W)

    def turned(x_0, y_0, angle):
        """Coordinates (B, n, H, W) around the points (x_0, y_0), turned by `angle`, all (B, n, 1, 1)."""
        return ((x - x_0) * angle.cos() + (y - y_0) * angle.sin(), (y - y_0) * angle.cos() - (x - x_0) * angle.sin())

    across, _ = turned(0, 0, uniform(0, math.pi, 1))                        # (B, 1, H, W)
    stripes = 0.5 + 0.5 * torch.sin(across * 2 * math.pi / uniform(3, 12, 1) + uniform(0, 2 * math.pi, 1))
    picture = paint(uniform(0, 1, 3), uniform(0, 1, 3), stripes * uniform(0, 1, 1))          # (B, 3, H, W)
    for _ in range(5):                                                      # blobs
        distance = torch.hypot(x - uniform(0, SIZE, 1), y - uniform(0, SIZE, 1))             # (B, 1, H, W)
        picture = paint(picture, uniform(0, 1, 3), torch.exp(-(distance / uniform(2, 6, 1)).square() / 2))
    bright = (uniform(0, 1, 3) < 0.5).float()                               # (B, 3, 1, 1) the coin
    picture = 0.55 * picture + 0.45 * (1 - bright)                          # (B, 3, H, W)
    u, v = turned(uniform(0, SIZE, 4), uniform(0, SIZE, 4), uniform(0, math.pi, 4))          # (B, 4, H, W)
    # How far outside the nearest of four short strokes a pixel is; 0.5 minus that, from 0 to 1, is how much of it is
    # covered, with a smooth edge. So it is with the shape below.
    outside = torch.maximum(u.abs() - uniform(0.5, 3, 4), v.abs() - uniform(0.4, 0.8, 4)).amin(dim=1, keepdim=True)
    picture = paint(picture, 0.75 * bright + uniform(0, 0.25, 3), 0.3 * (0.5 - outside).clamp(0, 1))

    radius = uniform(6.5, 9, 1)                                             # (B, 1, 1, 1)
    classes = torch.randint(len(CLASSES), (n_samples,), generator=generator)              # (B,)
    place = [radius + (SIZE - 2 * radius) * uniform(0, 1, 1) for _ in "xy"]               # where the whole circle fits
    u, v = turned(*place, uniform(0, 2 * math.pi, 1))                       # (B, 1, H, W)
    outside = shape_distances((u / radius).squeeze(1), (v / radius).squeeze(1)) * radius   # (B, 6, H, W) in pixels
    cover = (0.5 - outside[torch.arange(n_samples), classes].unsqueeze(1)).clamp(0, 1)       # (B, 1, H, W)
    picture = paint(picture, 0.75 * bright + uniform(0, 0.25, 3), cover)
    noise = 0.02 * torch.randn(picture.shape, generator=generator)          # (B, 3, H, W)
    return (picture + noise).clamp(0, 1), classes, cover.squeeze(1) > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(model, args):
    """Train `model`, the small network, on pictures that are drawn anew for each step."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.15,
                                                    cycle_momentum=False)
    report = progress(args.steps)
    model.train()
    for step in range(args.steps):
        images, target, _ = (t.to(args.device) for t in make_pictures(args.batch_size, generator))
        logits = model(images)                                              # (B, 6)
        loss = F.cross_entropy(logits, target)
        if step == 0:
            print_first_loss(loss.item(), len(CLASSES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        check_finite([loss], step + 1)
        report(step + 1, loss=loss.item(), accuracy=(logits.argmax(dim=1) == target).float().mean().item())
    check_finite(model.state_dict().values(), args.steps)


# ----------------------------------------------------------------------------------------------------------------------
# Photographs

WEIGHTS_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"    # the end of the name is its checksum
NAMES_URL = "https://raw.githubusercontent.com/pytorch/hub/master/imagenet_classes.txt"
NAMES_FILE = "data/imagenet_classes.txt"
PHOTOGRAPHS_URL = "https://raw.githubusercontent.com/EliSchwartz/imagenet-sample-images/master/"
PHOTOGRAPHS = [  # file, number of its class, SHA-256; the first four to look at, the last three to attack
    ("n01534433_junco.JPEG", 13, "72d3955d40e0a4c0e948b34c8271de38f4922b22f7f50c7aae7e0dabe48c33b6"),
    ("n02102040_English_springer.JPEG", 217, "c3386e4f5277915b684195a6badcabf913f5e91c1a5f6bdea71aae40b5e335e6"),
    ("n02326432_hare.JPEG", 331, "8ef47acf3deec515ca8638578112f34a1814218e997ad7ce78eaafcf41aa993a"),
    ("n02480855_gorilla.JPEG", 366, "d6c3f329e35532dd262dd4bbf0088edc951ca9448e4ec2619efee7c552282256"),
    ("n01484850_great_white_shark.JPEG", 2, "2154d212dbb63a67f1436967223d846f687121cdd9ed1a37d6ca8f0821d385bc"),
    ("n01641577_bullfrog.JPEG", 30, "0f7055de76565e6f08ae8050b9ef56a7de6e65846e6aa67c47859134db40a72b"),
    ("n02056570_king_penguin.JPEG", 145, "76a03cbc599244b2d647b326ef80f2c53fa664c92779b693955187afebd7ee75"),
]


def read_picture(path):
    """The picture in a file as the network wants it, (3, 224, 224): short side resized to 256, then the centre of that.

    Grey becomes three equal colours; an alpha channel is laid on white. Sizes are rounded like torchvision's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # Pillow warns of very large pictures; they are welcome
            # a format that is not "png" lets Pillow look into the file; a Path is never taken for a web address
            pixels = torch.tensor(matplotlib.image.imread(pathlib.Path(path), format="any"))
    except Exception as error:                      # each format has its own words for a damaged file
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no picture, or damaged, or too large'}")
    pixels = pixels.float() / {torch.uint8: 255, torch.uint16: 65535}.get(pixels.dtype, 1)
    highest = pixels.max()                          # matplotlib returns grey of 2 bits in [0, 85], of 4 in [0, 17]
    pixels = pixels / (85 if highest > 17.5 else 17 if highest > 1.01 else 1)
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(-1).expand(-1, -1, 3)                     # (H, W, 3)
    if pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]    # (H, W, 3)
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    if long > 100 * short:
        fail(f"cannot use {path}: {width} x {height} pixels, one side is more than 100 times the other")
    size = [256 if side == short else int(256 * long / short) for side in (height, width)]
    x = F.interpolate(pixels.permute(2, 0, 1).unsqueeze(0), size, mode="bilinear", antialias=True)  # (1, 3, 256+, 256+)
    top, left = (int(round((side - 224) / 2)) for side in size)
    return x[0, :, top:top + 224, left:left + 224].clamp(0, 1)              # (3, 224, 224)


def imagenet_names(fetch):
    """The 1,000 class names of ImageNet; if they are not at hand and not to be fetched, the bare numbers."""
    if not fetch and not os.path.exists(NAMES_FILE):
        return [f"class {n}" for n in range(1000)]
    try:
        if not os.path.exists(NAMES_FILE):
            torch.hub.download_url_to_file(NAMES_URL, NAMES_FILE, progress=False)
        with open(NAMES_FILE, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
    except Exception as error:
        fail(f"cannot get {NAMES_URL} ({type(error).__name__}): try again, or put the file at {NAMES_FILE} by hand")
    if len(names) != 1000 or names[0] != "tench":
        fail(f"{NAMES_FILE} is not the list of 1,000 names that begins with tench: remove it")
    return names


def imagenet_weights():
    """The state_dict of torchvision's ResNet-18, trained on ImageNet, from data/ or the net."""
    try:
        return torch.hub.load_state_dict_from_url(WEIGHTS_URL, model_dir="data", map_location="cpu", progress=False,
                                                  check_hash=True, weights_only=True)
    except Exception as error:                      # no network, a cut connection, another checksum, a damaged file
        path = os.path.join("data", os.path.basename(WEIGHTS_URL))
        fail(f"cannot get {WEIGHTS_URL} ({type(error).__name__}): remove {path} if it is there and try again, or "
             "put the right file there by hand")


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def in_parts(function, *tensors):
    """function(*tensors) for many pictures, 250 at a time, so that they need not all fit into memory at once."""
    return torch.cat([function(*part) for part in zip(*(t.split(250) for t in tensors))])


@torch.no_grad()
def predict(model, images):
    """Probabilities (B, n_classes)."""
    return in_parts(lambda x: model.eval()(x).softmax(dim=1), images)


def accuracy_of(model, images, target):
    """The share of pictures whose most probable class is the target."""
    return (predict(model, images).argmax(dim=1) == target).float().mean().item()


def pointing_of(model, images, target, masks):
    """The share of pictures whose most salient pixel is on the shape or within two pixels, and that share by chance."""
    saliency = in_parts(lambda x, t: saliency_map(calculate_jacobian(model, x, t)[0]), images, target)   # (B, H, W)
    # the largest number in a window of 5 x 5: 1 on the shape and up to two pixels around it
    near = F.max_pool2d(masks.float().unsqueeze(1), 5, 1, padding=2).flatten(1)                          # (B, H * W)
    hits = near.gather(1, saliency.flatten(1).argmax(dim=1, keepdim=True))                               # (B, 1)
    return hits.mean().item(), near.mean().item()


def attack_table(model, images, target, args):
    """Print and return accuracies for growing eps: a list of (eps, sign steps, raw step, random signs)."""
    gradient = in_parts(lambda x, t: calculate_jacobian(model, x, t)[0], images, target).flatten(1)      # (B, 3HW)
    l1, l2, largest = gradient.abs().sum(dim=1), gradient.norm(dim=1), gradient.abs().amax(dim=1)        # (B,) each
    print(f"to first order (median over pictures) the sign step adds {(l1 * largest / l2 ** 2).nanmedian():.1f} times "
          f"as much to the loss as\nthe raw step, and {(l1 / l2).nanmedian():.1f} times as much as random signs "
          "typically do, up or down")
    signs = torch.randint(2, images.shape, generator=torch.Generator().manual_seed(args.seed)) * 2.0 - 1
    signs, rows = signs.to(images.device), []
    print(f"accuracy on {len(images)} pictures\n  eps*255   sign steps ({args.attack_steps})   raw step   random signs")
    for eps in sorted({0.0, 2 / 255, 4 / 255, 8 / 255, 16 / 255, args.eps}):
        changed = (in_parts(lambda x, t: adversarial_example(model, x, t, eps, args.attack_steps), images, target),
                   in_parts(lambda x, t: raw_step(model, x, t, eps), images, target),
                   (images + eps * signs).clamp(0, 1))
        rows.append((eps, *(accuracy_of(model, x, target) for x in changed)))
        print("{:9.4g} {:16.4f} {:10.4f} {:14.4f}".format(255 * eps, *rows[-1][1:]), flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def plot_samples(model, images, target, titles, names, args, file):
    """One row for each picture: itself, its saliency, both, and its three most probable classes (printed too).

    `titles` stand above the pictures, `names` are those of the classes, and `file` is what the figure is saved as.
    """
    saliency = saliency_map(calculate_jacobian(model, images, target)[0]).cpu()              # (B, H, W)
    probability, number_of = predict(model, images).topk(3, dim=1)                           # (B, 3) each
    figure, axes = plt.subplots(len(images), 4, figsize=(10, 2.3 * len(images) + 0.4), squeeze=False,
                                layout="constrained")
    for row, x, s, p, c, title in zip(axes, images.cpu(), saliency, probability.tolist(), number_of.tolist(), titles):
        print(f"{title}: " + ", ".join(f"{names[n]} {p_n:.3f}" for n, p_n in zip(c, p)))
        x = x.permute(1, 2, 0)                                                               # (H, W, 3)
        row[0].imshow(x.numpy())
        row[0].set_title(title, fontsize=9, parse_math=False)
        heat = row[1].imshow(s.numpy(), vmin=0, vmax=1, cmap="viridis")
        row[2].imshow(x.mean(dim=-1).numpy(), vmin=0, vmax=1, cmap="gray")                   # so all colour is saliency
        row[2].imshow(s.numpy(), vmin=0, vmax=1, cmap="viridis", alpha=0.55)
        for axis in row[:3]:
            axis.set_axis_off()
        row[3].barh(range(3), p, color="tab:blue")
        row[3].set_yticks(range(3), [names[n] for n in c], fontsize=8)
        row[3].invert_yaxis()
        row[3].set_xlim(0, 1.25)
        row[3].set_xticks([0, 0.5, 1], [0, 0.5, 1], fontsize=8)
        for i, p_n in enumerate(p):
            row[3].text(p_n + 0.02, i, f"{p_n:.3f}", va="center", fontsize=8)
    for axis, title in zip(axes[0, 1:], ("saliency", "both, picture in grey", "three most probable classes")):
        axis.set_title(title, fontsize=9)
    axes[-1, 3].set_xlabel("probability", fontsize=8)
    figure.colorbar(heat, ax=axes, label="saliency", aspect=15 * len(images))
    save_figure(figure, os.path.join(args.out_dir, f"{file}.png"), args.show)


def plot_attack(model, images, target, names, args, file):
    """One row for each picture: itself, then change and result of the sign steps, then those of the raw step."""
    results = [images, adversarial_example(model, images, target, args.eps, args.attack_steps),
               raw_step(model, images, target, args.eps)]
    figure, axes = plt.subplots(len(images), 5, figsize=(10.5, 2.45 * len(images) + 0.5), squeeze=False,
                                layout="constrained")
    for column, result in zip((0, 2, 4), results):
        probabilities = predict(model, result).cpu()                                         # (B, n_classes)
        for row, x, p, n in zip(axes, result.cpu(), probabilities, target.tolist()):
            row[column].imshow(x.permute(1, 2, 0).numpy())
            best = p.argmax().item()
            second = f"({names[n]} {p[n]:.3f})" if best != n else ""
            row[column].set_title(f"{names[best]} {p[best]:.3f}\n{second}", fontsize=9,
                                  color="black" if best == n else "tab:red")
        if column:
            # from [-eps, eps] to [0, 1], so that it can be seen: no change is 0.5, grey
            change = ((result - images) / max(2 * args.eps, 1e-9) + 0.5).clamp(0, 1).cpu()   # (B, 3, H, W)
            for row, x in zip(axes, change):
                row[column - 1].imshow(x.permute(1, 2, 0).numpy())
                row[column - 1].set_title(f"change by {'sign' if column == 2 else 'raw'} step\n", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(f"eps = {255 * args.eps:.3g}/255, sign steps: {args.attack_steps}; red: fooled; changes are "
                    "magnified: black -eps, grey none, white +eps, in each colour", fontsize=9)
    save_figure(figure, os.path.join(args.out_dir, f"{file}.png"), args.show)


def plot_accuracy(rows, args):
    """Accuracy against eps, one line for each way to change the pictures."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    eps, *lines = zip(*rows)
    for line, label, style in zip(lines, ("sign steps", "raw step", "random signs"), ("o-", "s--", "^:")):
        axis.plot([255 * e for e in eps], line, style, label=label)
    axis.axhline(1 / len(CLASSES), color="grey", linewidth=0.8, label="guessing")
    axis.set(title="accuracy under attack", xlabel="eps * 255", ylabel="accuracy", ylim=(0, 1.05))
    axis.legend()
    save_figure(figure, os.path.join(args.out_dir, "saliency_accuracy.png"), args.show)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def photographs(args):
    """Look at photographs, and attack them, with a ResNet-18 that was trained on ImageNet."""
    if args.image:                                  # read first: a wrong file is found before anything is fetched
        images = torch.stack([read_picture(path) for path in args.image])                    # (B, 3, 224, 224)
    model = resnet18()
    fill(model, imagenet_weights() if args.weights == "imagenet" else load(args.weights), args.weights)
    model.to(args.device).eval()
    names = imagenet_names(fetch=args.weights == "imagenet")
    if args.image:                                  # nobody says what is on them: the target is what the network sees
        images = images.to(args.device)
        target, known = predict(model, images).argmax(dim=1), {}                             # (B,)
        titles, look, attack = [os.path.basename(path) for path in args.image], slice(None), slice(None)
    else:
        for file, _, sha256 in PHOTOGRAPHS:
            download(PHOTOGRAPHS_URL + file, os.path.join("data", file), sha256)
        images = torch.stack([read_picture(os.path.join("data", file)) for file, _, _ in PHOTOGRAPHS]).to(args.device)
        target = torch.tensor([n for _, n, _ in PHOTOGRAPHS], device=args.device)            # (7,)
        known = {"accuracy": accuracy_of(model, images, target)}
        titles, look, attack = [names[n] for n in target.tolist()], slice(4), slice(4, 7)
    plot_samples(model, images[look], target[look], titles[look], names, args, "saliency_photographs")
    plot_attack(model, images[attack], target[attack], names, args, "saliency_photographs_adversarial")
    attacked = adversarial_example(model, images, target, args.eps, args.attack_steps)
    print_result(args, **known, accuracy_attacked=accuracy_of(model, attacked, target),
                 params=sum(p.numel() for p in model.parameters()))


def main(argv=None):
    """Train the small network or load one, see where it looks, and fool it; or do so with photographs."""
    parser = make_parser(__doc__)
    parser.add_argument("--eps", type=number(float, 0, 1), default=8 / 255, help="largest change of a pixel's "
                        "numbers, which are in [0, 1]; the default is 8/255")
    parser.add_argument("--attack_steps", type=number(int, 1, 1000), default=1, help="sign steps of the attack")
    parser.add_argument("--steps", type=number(int, 1, 10 ** 6), default=600, help="training steps")
    parser.add_argument("--batch_size", type=number(int, 2, 10 ** 4), default=64, help="pictures in each step")
    parser.add_argument("--lr", type=number(float, 0, 1e30), default=0.02, help="highest learning rate")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--load", metavar="FILE", help="do not train: small network, with weights of an earlier run")
    either.add_argument("--weights", metavar="imagenet|FILE", help="do not train: ResNet-18, with these weights, on "
                        "photographs")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="with --weights: your photographs")
    args = start(parser, argv)
    if args.image and args.weights is None:
        fail("argument --image: needs --weights, the small network knows no photographs")
    if args.weights is not None:
        return photographs(args)

    model = small_resnet().to(args.device, memory_format=torch.channels_last)        # a fifth faster on a CPU
    params = sum(p.numel() for p in model.parameters())
    # A seed that the training does not have (torch's generator takes 32 bits of it, so the change must be in these).
    fresh = make_pictures(N_FRESH, torch.Generator().manual_seed(args.seed ^ 2 ** 31))
    images, target, masks = (t.to(args.device) for t in fresh)              # (B, 3, 32, 32), (B,), (B, 32, 32)
    # Before any training: how often do mere edges point at the shape? (Adebayo et al. 2018)
    untrained, _ = pointing_of(model, images[:N_ATTACKED], target[:N_ATTACKED], masks[:N_ATTACKED])
    if args.load is not None:
        fill(model, load(args.load), args.load)
    else:
        print(f"{params:,} parameters, pictures of", ", ".join(CLASSES))
        train(model, args)
        path = os.path.join(args.out_dir, "saliency.pt")
        save_weights(path, **model.state_dict())
        print("saved:", path)
    accuracy = accuracy_of(model, images, target)
    pointing, chance = pointing_of(model, images, target, masks)
    print(f"{len(images):,} fresh pictures: accuracy {accuracy:.4f}\nmost salient pixel on the shape or within two "
          f"pixels: {pointing:.4f} (untrained {untrained:.4f}, by chance {chance:.4f})")
    rows = attack_table(model, images[:N_ATTACKED], target[:N_ATTACKED], args)
    plot_accuracy(rows, args)

    first = [target.tolist().index(c) for c in target.unique().tolist()[:4]]                # four different shapes
    titles = [CLASSES[c] for c in target[first].tolist()]
    plot_samples(model, images[first], target[first], titles, CLASSES, args, "saliency_samples")
    images, target = images[:100], target[:100]
    attacked = adversarial_example(model, images, target, args.eps, args.attack_steps)
    fooled = (predict(model, images).argmax(dim=1) == target) & (predict(model, attacked).argmax(dim=1) != target)
    chosen = fooled.int().argsort(descending=True, stable=True)[:3].tolist()                # the first three it fools
    plot_attack(model, images[chosen], target[chosen], CLASSES, args, "saliency_adversarial")
    accuracy_attacked = next(sign for eps, sign, _, _ in rows if eps == args.eps)
    print_result(args, accuracy=accuracy, pointing=pointing, accuracy_attacked=accuracy_attacked, params=params)


if __name__ == "__main__":
    run(main)
