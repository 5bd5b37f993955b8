"""The configuration of one run of `experiments.gr`, and the folder that belongs to it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxfi.data import DATASETS, AffineRanges, write_whole, writing
from jaxfi.engine import ENGINES, PRECISIONS
from jaxfi.faults import BIT_MODELS, STUCK_AT, sample_size
from jaxfi.models import MODELS
from jaxfi.outcomes import NAN_POLICIES
from jaxfi.training import TrainConfig

CONFIG_FILE = "config.json"
AUTO = "auto"
_LONGEST_NAME = 64  # of a flag
FAULT_MODELS = (*BIT_MODELS, STUCK_AT, "zero")


def setting(default: Any, help: str, decides: bool = True) -> Any:
    """A field with its flag's help: a `Sequence[str]` is a list with commas, a tuple many flags.

    One that does not decide the result may differ when a folder is continued.
    """
    return dataclasses.field(default=default, metadata={"help": help, "decides": decides})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that can be set; each field is a flag of the same name."""

    dataset: str = setting("digits", "digits, mnist or cifar10.")
    model: str = setting("lenet", "Network: a name in jaxfi.models.MODELS.")
    optimizer: str = setting("adadelta", "adadelta, adam, sgd, adagrad or rmsprop.")
    learning_rate: float | None = setting(None, "Initial learning rate; none is the optimizer's.")
    weight_decay: float = setting(0.0, "L2 penalty added to the gradient, as PyTorch does.")
    epochs: int = setting(20, "Epochs to train each network.")
    batch_size: int = setting(64, "Images per training step.")
    schedule: str = setting("step", "Learning-rate schedule: constant, step, cosine or plateau.")
    gamma: float = setting(0.7, "Factor of the step schedule.")
    decay_every: int = setting(3, "Epochs between two decays of the step schedule.")
    alpha: float = setting(0.05, "Weight of the gradient penalty, L + alpha |grad L|^2.")
    augment: bool = setting(True, "Random affine augmentation of the training images.")
    convolution: str = setting("auto", "Training's convolution: xla, im2col, or auto, the faster.")
    derivative: str = setting("auto", "Of the penalty: fast, plain, or auto, the faster one.")
    num_train_images: int = setting(0, "Training images to use, the first ones; 0 is all.")
    margin: float = setting(0.01, "e: half width of the interval that sets the sample size.")
    t: float = setting(2.58, "Half width of intervals in standard errors; 2.58 is 99 %.")
    p: float = setting(0.5, "Expected rate in the sample size; 0.5 is the safe choice.")
    num_faults: int = setting(0, "Faults to inject; 0 takes the sample size of margin, t and p.")
    audit_pairs: int = setting(
        200, "Pairs checked operation by operation after each campaign; 0 checks none.", False
    )
    num_images: int = setting(0, "Test images of the campaign, the first ones; 0 is all.")
    images_per_fault: int | str = setting(
        0, "Of those, images drawn for each fault; 0 is all; auto, as many as a pilot finds best."
    )
    fault_model: str = setting("bit-flip", "Fault model: bit-flip, stuck-at-0, stuck-at-1, zero.")
    fault_list: str = setting("", "CSV file of the faults to inject, in place of a sample.")
    nan: str = setting("argmax", "What a NaN output counts as: argmax (as published) or critical.")
    engine: str = setting("fast", "Campaign engine: fast, reference or vmap.")
    precision: str = setting("highest", "Matmul and convolution precision of the campaign.")
    campaign_batch_size: int = setting(100, "Images per batch of the campaign.")
    memory_budget: int = setting(
        0, "Device bytes the campaign may use; 0 is 70 % of it.", decides=False
    )
    seed: int = setting(0, "Seed of initialisation, batches, dropout, augmentation and faults.")

    def __post_init__(self) -> None:
        count = self.images_per_fault  # a flag's text
        if isinstance(count, str) and count.isdecimal():
            object.__setattr__(self, "images_per_fault", int(count))

    def validate(self) -> None:
        """Raises ValueError, in one line, for an unknown name or a number out of range."""
        count = self.images_per_fault
        known = count == AUTO if isinstance(count, str) else count >= 0
        self._require("images_per_fault", known, f"integers >= 0, and {AUTO}")
        for name, names in _NAMES.items():
            self._require(name, getattr(self, name) in names, ", ".join(names))
        for name in _COUNTS:
            self._require(name, getattr(self, name) >= 0, "integers >= 0")
        self._require("campaign_batch_size", self.campaign_batch_size >= 1, "integers >= 1")
        self._require_one_source_of_faults()
        sample_size(1, self.margin, self.t, self.p)  # raises for those out of range
        self.training(self.alpha).validate()

    def training(self, alpha: float) -> TrainConfig:
        """The settings of one network's training: those that have the same name here."""
        names = {field.name for field in dataclasses.fields(TrainConfig)} - {"alpha", "augment"}
        settings = {name: value for name, value in vars(self).items() if name in names}
        augment = AffineRanges() if self.augment else None
        return TrainConfig(alpha=alpha, augment=augment, **settings)

    def _require_one_source_of_faults(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if self.fault_list and field.name in _OF_A_SAMPLE and value != field.default:
                raise ValueError(
                    f"fault_list is {self.fault_list!r} and {field.name} is {value!r}: a list says "
                    f"all of its faults; with it, {field.name} must be {field.default!r}"
                )

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")


_NAMES = {
    "dataset": DATASETS,
    "model": MODELS,
    "fault_model": FAULT_MODELS,
    "nan": NAN_POLICIES,
    "engine": ENGINES,
    "precision": PRECISIONS,
}
_OF_A_SAMPLE = ("margin", "p", "num_faults", "fault_model")
_COUNTS = ("num_train_images", "num_faults", "num_images", "memory_budget")


def define_flags(values: flags.FlagValues, settings: type = Config) -> None:
    """Defines --workdir and a flag for each field of the dataclass `settings`."""
    define: dict[str, Any] = {
        "str": flags.DEFINE_string,
        "int": flags.DEFINE_integer,
        "int | str": flags.DEFINE_string,
        "float": flags.DEFINE_float,
        "float | None": flags.DEFINE_float,
        "bool": flags.DEFINE_boolean,
        "Sequence[str]": flags.DEFINE_list,
        "tuple[str, ...]": flags.DEFINE_multi_string,
    }
    flags.DEFINE_string(
        "workdir", None, "Folder of the results; the same again continues.", flag_values=values
    )
    for field in dataclasses.fields(settings):
        help, default = field.metadata["help"], field.default
        default = list(default) if isinstance(default, tuple) else default
        default = str(default) if field.type == "int | str" else default
        define[str(field.type)](field.name, default, help, flag_values=values)


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parses the command line; ends the program in one line for a flag it does not know."""
    try:
        return read_flags(arguments, flags.FLAGS)
    except ValueError as error:
        sys.exit(f"error: {error} (--helpfull lists the flags)")


def read_flags(arguments: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Reads flags and the flagfiles that they name into `values`; what is left is returned.

    Args:
      arguments: the program's name, then what the user wrote.

    Raises ValueError, in one line, for whatever is no flag.
    """
    program, *given = arguments
    try:
        spelled = values.read_flags_from_files(given, force_gnu=False)
        # For an unknown name absl looks for similar ones: of a long one, for seconds.
        names = (text.partition("=")[0] for text in spelled if text.startswith("-"))
        if any(len(name) > _LONGEST_NAME for name in names):
            raise flags.Error(f"a flag's name has more than {_LONGEST_NAME} characters")
        return values([program, *spelled])
    except (flags.Error, UnicodeDecodeError) as error:  # from a flagfile, perhaps no text
        raise ValueError(" ".join(str(error).split())) from None


def config_from_flags(values: flags.FlagValues, settings: type = Config) -> Any:
    """The configuration, a `settings`, that the parsed flags spell."""
    given = {field.name: values[field.name].value for field in dataclasses.fields(settings)}
    return settings(**given)


def read_flagfile(path: Path, settings: type = Config) -> Any:
    """The configuration, a `settings`, that a flagfile spells."""
    values = flags.FlagValues()
    define_flags(values, settings)
    read_flags(["experiment", f"--flagfile={path}"], values)
    return config_from_flags(values, settings)


def check_same_config(config: Any, workdir: Path) -> None:
    """Raises ValueError naming each difference if `workdir` belongs to another configuration.

    Settings that cannot change a result are not compared.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored.keys()
    except (ValueError, AttributeError, RecursionError):
        message = f"{path} is not a configuration: delete it or take another --workdir"
        raise ValueError(message) from None
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    free = [f.name for f in dataclasses.fields(config) if not f.metadata.get("decides", True)]
    differences = [
        f"{name} is {stored.get(name)!r} there and {wanted.get(name)!r} here"
        for name in wanted | stored
        if name not in free and stored.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"{workdir} holds another configuration: {'; '.join(differences)}")


def claim_workdir(config: Any, workdir: Path) -> None:
    """Makes `workdir` and writes the configuration into it, whole or not at all.

    Raises OSError if the folder cannot be written.
    """
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG_FILE).exists():
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_whole(workdir / CONFIG_FILE, text.encode())
