"""What a person can choose about a judge; the command line and training configs share it."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefmoe.labeling.judge.wording import Language, Wording

LOCAL = "local:"


class JudgeSettings(BaseModel):
    """Who labels, in which words, how fast and for how much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: str = Field(
        min_length=1,
        description="model of an OpenAI-compatible endpoint, or `local:NAME` for one that runs here: a folder, "
        "a GGUF file, `smollm2-135m`, a hub id",
    )
    base_url: str | None = Field(
        None, description="address up to `/v1`; without it OPENAI_BASE_URL counts, else OpenAI's"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of a local judge; `bfloat16` halves its memory and is faster where the machine has units for "
        "it, but blurs the answers of a weak judge",
    )
    language: Language = Field("en", description="of the questions")
    ties: bool = Field(True, description="whether the judge may say that neither side is better")
    points: list[str] = Field(
        [], description="names of points to ask about; without any all of the tasks file"
    )
    points_per_call: int = Field(1, ge=1, description="points that one call asks about; 1 as in the paper")
    max_characters: int | None = Field(
        None, ge=1, description="of the conversation and of each side; longer ones are cut"
    )
    confidence: bool = Field(False, description="ask for log-probabilities too, for soft labels")
    calibrate: bool = Field(
        False,
        description="take the judge's own preference for a place out of its answers before the two orders are "
        "compared; needs probabilities, of a local judge or by `confidence`",
    )
    concurrency: int = Field(16, ge=1, le=1024, description="calls under way at the same time")
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="that make the calls; more than one where an endpoint answers faster than one core can ask, some "
        "hundred calls a second",
    )
    requests_per_minute: float | None = Field(None, gt=0, description="without it there is no limit")
    tokens_per_minute: float | None = Field(
        None, gt=0, description="read and written; without it there is no limit"
    )
    timeout: float = Field(
        60.0, gt=0, description="seconds without an answer after which a call is made again"
    )
    attempts: int = Field(8, ge=1, description="tries of one call before the run stops")
    max_answer_tokens: int = Field(
        16, ge=1, description="tokens of an answer on one point; models that think first need more"
    )
    input_price: float | None = Field(None, ge=0, description="US dollars for a million tokens read")
    output_price: float | None = Field(None, ge=0, description="US dollars for a million tokens written")
    max_usd: float | None = Field(
        None, gt=0, description="stop before more is spent, earlier sittings included"
    )
    max_calls: int | None = Field(
        None, gt=0, description="stop after so many answers, earlier sittings included"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_usd is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_usd needs input_price and output_price; look them up at the provider")
        if self.is_local and self.points_per_call > 1:
            raise ValueError(
                "points_per_call above 1 needs an endpoint; a local judge is asked one point at a time"
            )
        if self.is_local and self.base_url is not None:
            raise ValueError(f"base_url does not go with {self.judge!r}; drop one of the two")
        if not self.is_local and self.dtype != "float32":
            raise ValueError(f"dtype goes with a local judge only; {self.judge!r} runs at its endpoint")
        if self.calibrate and not (self.is_local or self.confidence):
            raise ValueError("calibrate needs probabilities; add confidence, or take a local judge")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the judge runs in this process."""
        return self.judge.startswith(LOCAL)

    @property
    def wording(self) -> Wording:
        """How questions are put."""
        return Wording(self.language, self.ties, self.max_characters)
