"""Options that are one of a few words."""

from enum import Enum


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    auto = "auto"  # bf16 where the device computes in it, else fp32
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class BackendName(Enum):
    deepspeed = "deepspeed"  # ZeRO, in stages
    fsdp = "fsdp"  # torch's FSDP2: what ZeRO stage 3 does, without DeepSpeed
    ddp = "ddp"  # torch's plain data parallelism: every process holds everything


class Offload(Enum):
    none = "none"
    optimizer = "optimizer"  # master weights, AdamW's moments and the average; the CPU makes the step
    parameters = "parameters"  # the weights between their uses, too


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"


class LrDecay(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class WandbMode(Enum):
    auto = "auto"  # online when logged in, else offline
    offline = "offline"
    online = "online"
    disabled = "disabled"


class Source(Enum):
    demo = "demo"
    layout = "layout"
    subject = "subject"
    twemoji = "twemoji"
    folder = "folder"
    shards = "shards"
    mds = "mds"
    mix = "mix"


DRAWN = {Source.demo, Source.layout, Source.subject}  # by us, as many as one asks for


class ImageFormat(Enum):
    png = "png"
    jpg = "jpg"
    webp = "webp"


class ResizeFilter(Enum):
    lanczos = "lanczos"
    bicubic = "bicubic"


class Crop(Enum):
    center = "center"
    random = "random"


class Reconstruction(Enum):
    l1 = "l1"
    l2 = "l2"


class ExportFormat(Enum):
    diffusers = "diffusers"  # a folder for StableDiffusionPipeline
    compvis = "compvis"  # one file with the names of the original Stable Diffusion


class Adversarial(Enum):
    hinge = "hinge"
    non_saturating = "non_saturating"  # logistic


class Perceptual(Enum):
    none = "none"
    lpips = "lpips"  # VGG16 features; needs its backbone weights on disk
    efficientnet = "efficientnet"  # EfficientNet-Lite0 features from a package, offline


class Degradation(Enum):
    bicubic = "bicubic"  # made smaller, and nothing else
    bsr_light = "bsr_light"  # with a little blur, noise and JPEG, in random order
    bsr = "bsr"  # with much of them


class MaskStyle(Enum):
    thin = "thin"
    medium = "medium"
    thick = "thick"


class Prediction(Enum):
    eps = "eps"
    v = "v"
    x0 = "x0"
    flow = "flow"


class Distance(Enum):
    l2 = "l2"
    l1 = "l1"
    huber = "huber"  # half of l2 for small differences, linear beyond process.huber_delta


class BetaSchedule(Enum):
    linear = "linear"
    scaled_linear = "scaled_linear"  # linear in the square root of beta: what the LDM code calls linear
    cosine = "cosine"
    sigmoid = "sigmoid"


class TimestepSampling(Enum):
    uniform = "uniform"
    logit_normal = "logit_normal"


class DistillMethod(Enum):
    lcm = "lcm"
    scm = "scm"  # of a teacher of v or flow
    consistency_training = "consistency_training"
    guidance = "guidance"  # alone, for solvers of many steps


class Sampler(Enum):
    ddpm = "ddpm"
    ddim = "ddim"
    pndm = "pndm"
    euler = "euler"
    euler_ancestral = "euler_ancestral"
    heun = "heun"
    dpm2 = "dpm2"
    dpmpp_2s = "dpmpp_2s"
    dpmpp_2m = "dpmpp_2m"
    dpmpp_2m_sde = "dpmpp_2m_sde"
    dpmpp_3m_sde = "dpmpp_3m_sde"
    unipc = "unipc"
    lcm = "lcm"
    mean_flow = "mean_flow"


WITH_ETA = {Sampler.ddim, Sampler.euler_ancestral, Sampler.dpmpp_2m_sde, Sampler.dpmpp_3m_sde}
STOCHASTIC = WITH_ETA | {Sampler.ddpm, Sampler.lcm}


class Spacing(Enum):
    trailing = "trailing"
    leading = "leading"
    linspace = "linspace"
    karras = "karras"
    exponential = "exponential"


class Weighting(Enum):
    """What the weight of a word in a prompt multiplies."""

    difference = "difference"  # that the word makes to the prediction; one prediction more for each weight
    tokens = "tokens"  # its own tokens: their text states in a prompt, the attention that they get in an edit


class EvaluationSubject(Enum):
    unet = "unet"  # by the images that it draws
    autoencoder = "autoencoder"  # by those that it gives back


class JudgeName(Enum):
    """Of what was asked for: is it there?"""

    classes = "classes"  # the class of the image
    boxes = "boxes"  # an object of its class in each box, and nothing elsewhere
    segments = "segments"  # the class of each pixel


class CacheDtype(Enum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Accelerator(Enum):
    """A GPU and the machine that it usually stands in; `train/engine/accelerators.py` has its figures."""

    v100 = "v100"
    a100_40gb = "a100_40gb"
    a100 = "a100"  # 80 GB
    l40s = "l40s"
    rtx4090 = "rtx4090"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"


class EditMode(Enum):
    auto = "auto"  # replace between prompts of equally many words, else refine
    replace = "replace"  # words are swapped, one for one
    refine = "refine"  # words are added, left out or swapped; new ones have attention of their own


class InversionMethod(Enum):
    ddim = "ddim"  # the noise alone; guidance then leads away from the image
    negative_prompt = "negative_prompt"  # and guidance leads away from the source's prompt, which leaves it as it is
    null_text = "null_text"  # and away from what was fitted to the image at every step


class TerminalImages(Enum):
    auto = "auto"  # as the terminal says of itself that it can; else not at all
    kitty = "kitty"  # kitty's protocol; Ghostty and Konsole know it, too
    sixel = "sixel"  # foot, WezTerm, mlterm, mintty, Windows Terminal from 1.22 on
    none = "none"
