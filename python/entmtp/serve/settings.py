"""Settings of the server: llama-cpp-python's own, and how to draft.

Each is an option of the command, an environment variable, and a key of the config file, as in llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional  # Optional: llama-cpp-python's parser knows no `X | None`

from llama_cpp.server import settings as stock
from pydantic import Field, ValidationError, create_model, field_validator

from ..common.errors import EntmtpError
from ..options.table import OPTIONS, Option

# what llama-cpp-python's server has no setting for, or means another thing by: there draft_model names prompt lookup,
# and types of the cache are numbers
OURS = tuple(
    option
    for option in OPTIONS
    if option.name in ("draft_model", "cache_type")
    or option.arguments[0] not in stock.ModelSettings.model_fields
)


def setting(option: Option) -> str:
    """What the server calls an option."""
    return option.name if option in OURS else option.arguments[0]


def spellings() -> dict[str, str]:
    """Options as the other commands have them: what the server's command line calls them."""
    found = {"--no-page": "--page=false"}
    for option in OPTIONS:
        found |= dict.fromkeys(option.spellings, f"--{setting(option)}")
        if option.type is bool:
            found |= {option.words(False)[0]: f"--{setting(option)}=false"}
    return found


def _is_type(option: Option) -> bool:
    return isinstance(option.type, type)


def _reader(option: Option) -> Callable[[Any], Any]:
    """What makes a value of a word for an option that says so itself; a config file may have the value."""

    def read(value: Any) -> Any:
        try:
            return option.parse(value) if isinstance(value, str) else value
        except argparse.ArgumentTypeError as e:
            raise ValueError(str(e)) from e

    return read


def _field(option: Option) -> tuple[Any, Any]:
    """A setting's type and default, as pydantic wants them."""
    kind: Any = Literal[option.choices] if option.choices else option.type if _is_type(option) else str
    if option.default is not None:  # it is said beside the description
        return kind, Field(default=option.default, description=option.help)
    kind = Optional[kind]  # noqa: UP045
    return kind, Field(default=None, ge=option.least, le=option.most, description=option.description)


_fields: dict[str, Any] = {option.name: _field(option) for option in OURS}
_readers: dict[str, Any] = {
    f"_read_{option.name}": field_validator(option.name, mode="plain")(_reader(option))
    for option in OURS
    if not _is_type(option)
}
_Ours: Any = create_model("_Ours", __base__=stock.ModelSettings, __validators__=_readers, **_fields)


class ModelSettings(_Ours):
    """One model, and how to draft for it: llama-cpp-python's settings and those of options/table.py."""

    n_threads: Optional[int] = Field(  # noqa: UP045
        default=None, description="CPU threads; without, as many as the machine has to spare"
    )
    n_threads_batch: Optional[int] = Field(  # noqa: UP045
        default=None, description="CPU threads of passes over several tokens; without, as n_threads"
    )
    logits_all: bool = Field(
        default=False,
        description="keep the logits of every token, as in llama-cpp-python; logprobs do not need them",
    )
    verbose: bool = Field(default=False, description="say what llama.cpp and llama-cpp-python do")

    @field_validator("draft_model")
    @classmethod
    def _one_way_to_draft(cls, value: str | None) -> str | None:
        if value == "prompt-lookup-decoding":
            raise ValueError(
                "this server drafts from the text anyway; leave draft_model out, or name a smaller model's file"
            )
        return value

    @field_validator("clip_model_path")
    @classmethod
    def _text_only(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("this server reads no images yet")
        return value


class ServerSettings(stock.ServerSettings):
    """Where and how to listen."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all of this machine's")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: a free one")
    parallel: int = Field(
        default=1, ge=1, le=64, description="answers at a time, in shared passes; each may have n_ctx tokens"
    )
    kv_tokens: Optional[int] = Field(  # noqa: UP045
        default=None,
        ge=1,
        description="with parallel: tokens of all answers together; without, parallel times n_ctx",
    )
    stall: float = Field(
        default=0.2,
        gt=0.0,
        description="with parallel: seconds that answers may have to wait for a prompt; long ones are read in pieces",
    )
    max_body: int = Field(
        default=4 << 20,
        ge=1,
        description="bytes that a request may have; all that are there at a time may have 16 times as many",
    )
    max_receive: float = Field(
        default=60.0, gt=0.0, description="seconds that a request may take to come, headers and body"
    )
    max_waiting: int = Field(
        default=256, ge=0, description="requests that may wait; further ones get status 429"
    )
    max_seconds: Optional[float] = Field(  # noqa: UP045
        default=None,
        gt=0.0,
        description="seconds that an answer may take once it has begun; then it ends as by max_tokens",
    )
    cors: Optional[str] = Field(  # noqa: UP045
        default=None, description="origins of pages whose scripts may ask, with commas between them; *: any"
    )
    allowed_hosts: Optional[str] = Field(  # noqa: UP045
        default=None,
        description="without api_key on this machine's own address: further names it is called by, with commas between "
        "them; *: any",
    )
    page: bool = Field(default=True, description="a page to chat with at /, which shows who guessed what")
    interrupt_requests: bool = Field(
        default=False,
        description="cut a running streamed answer when another request comes, instead of answering in order",
    )

    @field_validator("api_key")
    @classmethod
    def _a_key(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("it is empty, and everybody would be served; leave it out for that")
        return value and value.strip()  # a file that it comes from ends with a line end


class ConfigFile(ServerSettings):
    """A config file: the server's settings, and models by alias."""

    models: list[ModelSettings] = Field(default=[], description="models; the first is the default one")


def read_config(path: str) -> tuple[ServerSettings, list[ModelSettings]]:
    """Settings from a JSON or YAML file.

    Raises:
        EntmtpError: there is no such file, or it is not one of ours; the sentence says where.
    """
    try:
        text = Path(path).read_text("utf-8")
        if path.endswith((".yaml", ".yml")):
            import yaml

            try:
                text = json.dumps(yaml.safe_load(text))
            except yaml.YAMLError as e:
                raise EntmtpError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
        config = ConfigFile.model_validate_json(text)
    except ValidationError as e:
        raise EntmtpError(f"{path}: {sentence(e)}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise EntmtpError(f"{path}: cannot read the config file: {e}") from e
    if not config.models:
        raise EntmtpError(
            f'{path}: names no models; give at least one, as in "models": [{{"model": "m.gguf"}}]'
        )
    shared = {k: v for k, v in config.model_dump().items() if k != "models"}
    return ServerSettings(**shared), config.models


def from_options(options: dict[str, Any]) -> tuple[ServerSettings, list[ModelSettings]]:
    """Settings from the command's options; those that were not given come from the environment.

    Raises:
        EntmtpError: a value that cannot be.
    """

    def of(kind: Any) -> Any:
        return kind(**{k: v for k, v in options.items() if v is not None and k in kind.model_fields})

    try:
        return of(ServerSettings), [of(ModelSettings)]
    except ValidationError as e:
        raise EntmtpError(sentence(e)) from e


def config_path(option: str | None) -> str | None:
    """The config file to read; taken out of the environment, where llama-cpp-python would read it again."""
    return os.environ.pop("CONFIG_FILE", None) or option


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what[:1].lower()}{what[1:]}" if where else what
