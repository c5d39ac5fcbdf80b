"""What both sides are told and what they tell, as files of JSON and of weights.

Nothing here needs more than the standard library: trl's side runs in another Python, which may have
neither this project nor today's libraries.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Stage = Literal["sft", "reward", "dpo", "ppo", "grpo", "rloo"]
Row = dict[str, Any]
Ids = dict[str, list[int]]  # of one row: by the names of `COLUMNS`

# The ids of a row as the model reads them: after any cut, without padding. SFT's response is what
# is trained on; what a reward model reads is one text with its response.
COLUMNS: dict[str, tuple[str, ...]] = {
    "sft": ("prompt_ids", "response_ids"),
    "reward": ("chosen_ids", "rejected_ids"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    **dict.fromkeys(("ppo", "grpo", "rloo"), ("prompt_ids", "response_ids")),
}


@dataclass
class Rollout:
    """What both sides of PPO, GRPO and RLOO take as sampled in one step: ids and score of a row."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # with EOS where there is one
    scores: list[float]


@dataclass
class Job:
    """What trl's side is told.

    Args:
        stage: of the run.
        model: folder of the model that is trained.
        steps: optimizer steps to record; of PPO rollouts.
        rows: in trl's columns: ``prompt`` and ``completion``, or ``prompt``, ``chosen``,
            ``rejected`` and perhaps ``margin``. Texts, or lists of messages.
        options: fields of trl's config that were given; they go before all others.
        float64: compute all in float64.
        script: a script of the user's that trains with trl, or None: then trl is driven here.
        script_arguments: its command line.
        rollouts: of PPO, one for each step.
        value_head: of PPO, the weights that both value heads start from; their bias is 0.
        dropout: False: it is switched off in all modules, whatever the options say.
        float32: True: all is computed in float32 at least, whatever options or script say.
    """

    stage: Stage
    model: str
    steps: int
    rows: list[Row]
    options: dict[str, Any] = field(default_factory=dict)
    float64: bool = False
    script: str | None = None
    script_arguments: list[str] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    value_head: list[float] = field(default_factory=list)
    dropout: bool = True
    float32: bool = False

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> "Job":
        """The inverse of `save`."""
        job = cls(**json.loads(file.read_text(encoding="utf-8")))
        job.rollouts = [Rollout(**rollout) for rollout in map(dict, job.rollouts)]  # type: ignore
        return job


@dataclass
class Record:
    """What a run was and what came of it, the same for both sides.

    Args:
        versions: of ``python``, ``torch``, ``transformers`` and, on trl's side, ``trl``.
        trainer: trl's class, or our function.
        options: the whole config as it took effect.
        facts: what no option tells. Of both sides: ``dtype``, ``dropout`` (the largest share that
            was active in training), ``pad_id``, ``eos_id``, ``optimizer`` (class, with ``betas``,
            ``eps``), ``total_steps`` (what the schedule counts to), ``ref_model`` (DPO: whether it
            was given, copied or reloaded). Of PPO also ``temperature`` (what log-probabilities are
            computed with) and ``accumulated`` (micro-batches of one optimizer step). Of trl's side:
            ``defaults`` (of the options of the job, if they had not been given),
            ``dataset_rows`` (that it was given), ``ref_is_start`` (DPO: whether the reference is
            the model before its first step), ``micro_losses`` of each step, ``micro_shares`` (what
            each of them adds to the loss of its step), and, only where it is so,
            ``numbers`` (rows are not numbered as they were given), ``packed``, ``holes`` (a
            response is not all of the text from its first token on), ``raw_rows`` (why there are
            none), ``new_weights``, ``rows``, ``config`` and ``tokenizer`` (what was translated).
        rows: number of a row -> its ids, of all rows that were trained on in the recorded steps.
        left_out: rows of the job that the side has dropped, and why.
        batches: of each step its micro-batches, as numbers of rows in their order; of PPO those of
            all its epochs, where the rows of all rollouts are counted on.
        steps: the metrics of each step under our names, see `names.py`.
        logged: of trl's side, what it logged itself, names and all.
        raw_rows: of a script: number of a row -> its columns before tokenising; of the rows that
            were trained on, and of those that would have been if none had been dropped.
        warnings: what trl and transformers warned of.
        seconds, peak_bytes: of the recorded steps, and of the process.
    """

    stage: Stage
    versions: dict[str, str]
    trainer: str
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, Ids] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    batches: list[list[list[int]]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    logged: list[dict[str, Any]] = field(default_factory=list)
    raw_rows: dict[int, Row] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0

    def save(self, folder: Path) -> None:
        """Write it as JSON."""
        (folder / RECORD).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """The inverse of `save`."""
        record = cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        for name in ("rows", "left_out", "raw_rows"):  # JSON's keys are texts
            setattr(record, name, {int(k): v for k, v in getattr(record, name).items()})
        return record


# In the folder of trl's side
JOB = "job.json"
RECORD = "record.json"
WEIGHTS = "weights.safetensors"  # of the trained model after the last step, by its own names
START = "start"  # of a script: folder of the model and tokenizer before the first step
REFERENCE = "reference"  # of a script of DPO: its reference, if that is not the start model
ERROR = "error.txt"  # one line, if there is no record
