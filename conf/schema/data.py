"""Commands that make and look at data sets."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.overrides import a_path
from conf.schema.choices import DRAWN, CacheDtype, Crop, ImageFormat, Source
from conf.schema.conditions import ConditionsConfig
from conf.schema.shared import ImageConfig, RuntimeConfig, WandbConfig, require, require_captions, require_positive


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which samples a build leaves out although nothing is wrong with them; all off by default."""

    min_side: int = 0  # pixels of the shorter side
    max_aspect: float = 0.0  # longer side / shorter side; 0: any
    min_caption: int = 0  # characters
    max_caption: int = 0  # characters; 0: any
    min_score: dict[str, float] = field(default_factory=dict)  # by field of the sample's JSON; no field, no sample
    max_score: dict[str, float] = field(
        default_factory=dict
    )  # the other way round, such as {pwatermark: 0.5, punsafe: 0.1}
    near_duplicates: int = -1  # bits of 64 in which the perceptual hash of a copy may differ; -1: keep copies

    def __post_init__(self) -> None:
        require(
            -1 <= self.near_duplicates <= 16,
            f"filters.near_duplicates={self.near_duplicates}: must be -1 (off) or 0 to 16 bits",
        )
        require(
            self.max_aspect == 0 or self.max_aspect >= 1,
            f"filters.max_aspect={self.max_aspect}: must be 0 (any) or at least 1",
        )


@dataclass(kw_only=True, slots=True)
class MixedSource:
    """One of several sources of a build."""

    source: Source = Source.folder  # any but mix
    name: str | None = None  # under which samples and manifest remember it; None: that of the source
    path: str | None = a_path(None)  # as that of the build
    image_column: str = "path"  # of a table or mds: image, or its file's path relative to the table's folder
    caption_column: str = "caption"  # of a table or mds: text, or a list of texts beside images
    class_from_folder: bool = False  # as that of the build
    weight: float = 1.0  # its share of the samples, relative to the others

    def __post_init__(self) -> None:
        require(self.source is not Source.mix, "sources: a mix cannot hold a mix")
        require_positive(self, "weight", group="sources: ")


@dataclass(kw_only=True, slots=True)
class BuildRun:
    """`data/build_shards.py`: any source of images to WebDataset shards, `train/` and `heldout/`.

    python data/build_shards.py experiment=demo
    python data/build_shards.py source=folder path=~/photos resolution=512 format=webp run_dir=RUN
    python data/build_shards.py source=shards path=/data/laion filters.min_side=256 run_dir=RUN
    """

    run_dir: str = a_path()  # the project's folder; stages find each other's results below it
    name: str = MISSING  # of the project; the default run_dir and the W&B group
    seed: int = 0  # of all that is drawn at random
    output_dir: str = a_path()  # folder of this command's results; by default one below run_dir
    source: Source = Source.demo  # scenes, canvases of objects, one creature, emoji, files, shards, mosaicml's, several
    path: str | None = a_path(
        None
    )  # folder: images or .csv, .tsv, .parquet; shards: folder or tars, also http(s)://, s3://; mds: folder
    sources: list[MixedSource] = field(default_factory=list)  # source=mix: those that are mixed
    filters: FilterConfig = field(default_factory=FilterConfig)
    timeout_s: float = 60.0  # seconds without a byte after which a server of shards counts as dead
    image_column: str = "path"  # of a table or mds: image, or its file's path relative to the table's folder
    caption_column: str = "caption"  # of a table or mds: text, or a list of texts beside images
    class_from_folder: bool = False  # source=folder: each image's class is the name of the folder it lies in
    samples: int = 0  # source=demo, layout or subject: images to draw; elsewhere the most to take, 0 for all
    resolution: int = 0  # pixels of the shorter side, never enlarged, 0 to keep; of drawn sources: of the square
    format: ImageFormat = ImageFormat.png  # of the stored images
    quality: int = 95  # of jpg and webp
    background: str = "white"  # colour name or #rrggbb behind transparent pixels
    shard_samples: int = 1000  # samples per shard
    heldout_fraction: float = 0.04  # share of captions that training never sees; chosen by a digest of the caption
    max_pixels: int = 64_000_000  # an image with more goes to rejects.jsonl
    workers: int = 0  # processes; 0: one per core

    def __post_init__(self) -> None:
        require(
            self.source is not Source.folder or bool(self.path), "source=folder needs path=FOLDER, .csv or .parquet"
        )
        require(
            self.source is not Source.shards or bool(self.path),
            "source=shards needs path=FOLDER, 'path=\"FOLDER/{00000..00099}.tar\"' or an address of either",
        )
        require(
            self.source is not Source.mds or bool(self.path), "source=mds needs path=FOLDER, which has an index.json"
        )
        require(
            (self.source is Source.mix) == bool(self.sources),
            "source=mix and 'sources=[{source: ..., path: ..., weight: ...}, ...]' go together",
        )
        names = [member.name or member.source.value for member in self.sources]
        require(len(set(names)) == len(names), f"sources: the names {', '.join(names)} are not all different; set name")
        require_positive(self, "timeout_s")
        drawn, least = self.source in DRAWN, 32 if self.source is Source.layout else 16
        name = f"source={self.source.value}"
        require(not drawn or self.samples > 0, f"{name} needs samples=N images to draw")
        require(not drawn or self.resolution >= least, f"{name} needs resolution>={least} pixels")
        require(
            not self.class_from_folder or self.source is Source.folder,
            "class_from_folder=true needs source=folder; in a mix it stands with the source that it is for",
        )
        require(0 <= self.heldout_fraction < 1, f"heldout_fraction={self.heldout_fraction}: must be in [0, 1)")
        require(self.shard_samples > 0, f"shard_samples={self.shard_samples}: must be positive")


@dataclass(kw_only=True, slots=True)
class BucketConfig:
    """Shapes of images that are not square, all of about images.resolution² pixels."""

    max_aspect: float = 1.0  # longer side / shorter side, at most; 1: squares only
    step: int = 64  # pixels of which each side is a multiple

    def __post_init__(self) -> None:
        require(self.max_aspect >= 1, f"buckets.max_aspect={self.max_aspect}: must be at least 1 (squares only)")
        require_positive(self, "step", group="buckets.")


@dataclass(kw_only=True, slots=True)
class PrecomputeRun:
    """`data/precompute_latents.py`: image shards to latent shards, once for all trainings.

    python data/precompute_latents.py experiment=demo
    python data/precompute_latents.py experiment=demo plan=true
    torchrun --nproc-per-node=8 data/precompute_latents.py run_dir=RUN runtime=gpu
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()
    shards: str = a_path()  # folder that holds train/ and heldout/
    autoencoder: str = a_path()  # folder with the frozen autoencoder (config.json, safetensors)
    clip: str = a_path()  # folder with the frozen CLIP, or a pretrained open_clip name; read where a condition needs it
    images: ImageConfig = field(default_factory=ImageConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)  # whose arrays are kept beside the moments
    captions: list[str] = field(default_factory=lambda: ["caption"])  # of each image; others are fields of its .json
    dtype: CacheDtype = CacheDtype.fp16  # of moments and text states on disk
    text_states: bool = True  # cache the text tower's output too, not only the tokens
    variants: int = 1  # cuts kept of each image: the centre, then images.crop and images.flip drawn for each
    buckets: BucketConfig = field(default_factory=BucketConfig)
    batch_size: int = 64  # images decoded and encoded together; halved by itself where memory is short
    tile: int = 0  # pixels: larger images are encoded in overlapping squares of this side, one at a time; 0: whole
    threads: int | None = None  # that decode images beside the encoder; null: as many as the process has cores
    lease_s: float = 120.0  # seconds after which the claim of a process that shows no life on another machine is void
    check_samples: int = 64  # latents decoded back against their images
    min_psnr: float = 15.0  # dB; a cache that decodes worse is refused
    moments: str | None = a_path(None)  # a cache of the same images and autoencoder: only its texts are made anew
    train_shards: int = 0  # of images that are encoded for training, for trainings with encode=true; 0: all
    plan: bool = False  # only say how much storage and time the cache will take
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        require_positive(self, "variants", "batch_size", "check_samples", "lease_s")
        require(self.threads is None or self.threads > 0, f"threads={self.threads}: must be null or positive")
        require(self.train_shards >= 0, f"train_shards={self.train_shards}: must be 0 (all) or positive")
        require(
            self.moments is None or self.buckets.max_aspect == 1,
            f"moments={self.moments}: a cache with aspect buckets cannot be taken over; leave it out",
        )
        require(len(self.captions) > 0, "captions=[]: name one, such as caption")
        require_captions("captions", self.captions)
        require(
            self.variants == 1 or self.images.crop is Crop.random or self.images.flip,
            f"variants={self.variants}: all would be the same; set images.crop=random or images.flip=true",
        )


@dataclass(kw_only=True, slots=True)
class PreviewRun:
    """`data/preview.py`: a contact sheet and the statistics of a data set.

    python data/preview.py run_dir=runs/demo
    python data/preview.py run_dir=runs/demo data=runs/demo/latents/train
    python data/preview.py run_dir=runs/demo data=runs/demo/shards/heldout sheet_images=16
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()
    data: str = a_path()  # folder of image or latent shards, such as RUN/shards/train
    autoencoder: str = a_path()  # decodes latents for the sheet
    sheet_images: int = 64  # on the contact sheet, spread over the data set
    samples: int = 20_000  # behind the statistics, at most
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require_positive(self, "sheet_images", "samples")
