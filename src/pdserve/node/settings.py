"""What a machine is told once, at its birth."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.request import Job, Role
from pdserve.cost.store import KnownCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignSettings:
    """What a worker is told beside that if its engine batches for itself.

    ``payload_format`` names what its hand-offs carry; a payload of more than ``max_payload_bytes``
    is not taken. Payloads travel in slices; to each peer at most ``payload_window_bytes`` are under
    way, and at most ``max_exports`` payloads for it are in memory, being made or being sent.
    ``recomputes_first_token``: what the engine draws first of an adopted attempt has been drawn.
    """

    payload_format: str
    recomputes_first_token: bool = False
    max_payload_bytes: int = 2 << 30
    payload_slice_bytes: int = 4 << 20
    payload_window_bytes: int = 16 << 20
    max_exports: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Settings of one worker process's machine. Durations are seconds on its own clock.

    ``max_step_tokens`` bounds a step of a worker without running decodes (Splitwise, sec. IV-B:
    2,048); ``mixed_chunk_tokens`` bounds the prompt tokens of a step that also decodes.
    ``one_shot_tokens``: a transfer of fewer tokens waits for the last layer (Splitwise, sec. IV-C:
    512). ``lease_s`` is how long a ticket is held without a sign of its writer;
    ``ticket_timeout_s`` how long a finished prefill waits for a ticket before the router is asked
    for another decode worker. ``max_preemptions`` bounds how often a sequence is set back while it
    waits for blocks (`node.turns`). With ``late_handoffs`` a hand-off begins when its prefill is
    done, and the first token waits for none of it: blocks are held for less time where it goes, and
    nothing is sent before the end. A hand-off that finds no room asks again after ``ask_again_s``;
    0: it is given blocks as soon as there are any. With ``foreign`` set the blocks only measure an
    engine's memory: nobody else sees them, and the layout has no layers.

    With ``terse_reports`` only this is news to the router: whether somebody is left out of the
    steps, unless the worker only decodes, and, where it is not in its home pool, whether it runs at
    all. All else goes with it, or with the heartbeat.

    For drivers that compute nothing: with ``bare_plans`` a step's plan says how large it is and not
    what its rows are; without ``report_samples`` reports say nothing of how long steps and
    transfers took; without ``logs_life`` there are no life events but those that the router acts
    upon.
    """

    worker: WorkerId
    epoch: Epoch
    role: Role
    layout: KvLayout
    num_blocks: int
    max_model_tokens: int
    max_step_tokens: int = 2048
    mixed_chunk_tokens: int = 512
    max_running: int = 256
    max_preemptions: int = 4
    one_shot_tokens: int = 512
    lease_s: float = 10.0
    ticket_timeout_s: float = 10.0
    heartbeat_s: float = 0.5
    report_interval_s: float = 0.01
    prefix_cache: bool = True
    terse_reports: bool = False
    late_handoffs: bool = False
    ask_again_s: float = 0.0
    bare_plans: bool = False
    report_samples: bool = True
    logs_life: bool = True
    foreign: ForeignSettings | None = None

    @property
    def longest_tokens(self) -> int:
        """Longest prompt and answer that fit the model, and the pool of a worker that has nothing
        else to hold."""
        return min(self.max_model_tokens, self.num_blocks * self.layout.block_size)

    def misfit(self, job: Job) -> str | None:
        """Why the job can never run on this worker, or None if it can."""
        num_tokens = len(job.token_ids) + 1
        if num_tokens > self.max_model_tokens:
            return f"{num_tokens} tokens do not fit {self.max_model_tokens}"
        num_blocks = self.layout.num_blocks_for(num_tokens)
        if num_blocks > self.num_blocks:
            return f"{num_blocks} KV blocks are needed and there are {self.num_blocks}"
        is_scored = job.params.prompt_logprobs is not None and job.next_index == 0
        if is_scored and self.foreign is not None:
            return "its engine does not tell log-probabilities of prompts"
        return None


class RoleControl(StrEnum):
    """What the role controller may do: nothing, move workers, or only say what it would do."""

    FIXED = "fixed"
    AUTO = "auto"
    ADVISE = "advise"


class ReturnRule(StrEnum):
    """When a worker that was drawn into the mixed pool goes home: when it has none of the other
    pool's work left (Splitwise, sec. IV-A), or not before it has run empty (as in SplitwiseSim)."""

    DONE = "done"
    IDLE = "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Settings of the router. Durations are seconds.

    ``queue_timeout_s``: a request that no worker has begun by then is refused (429);
    ``max_queued_requests``: so is one that finds this many waiting. A worker that is silent for
    ``silent_after_s`` gets no work, and after ``report_timeout_s`` it is killed;
    ``step_timeout_s``: so is one whose step is older than this and than ten times what it expected.
    ``max_attempts`` bounds the resumes that one choice may need because of failures (not of
    preemption). ``admission`` names the policy that refuses early (``policy.admission``);
    ``patience_s`` is for how long a request lets others pass (``waiting``). ``costs``: what is
    known of steps and links at birth. ``moves``: requests that decode may move from a crowded
    worker to another (`node.moves`). ``logs_life``: as a worker's.
    """

    queue_timeout_s: float = 30.0
    patience_s: float = 10.0
    admission: str = "none"
    max_queued_requests: int = 1024
    silent_after_s: float = 1.5
    report_timeout_s: float = 3.0
    step_timeout_s: float = 30.0
    max_attempts: int = 8
    no_worker_timeout_s: float = 15.0
    costs: KnownCosts = field(default_factory=KnownCosts)
    roles: RoleControl = RoleControl.FIXED
    return_rule: ReturnRule = ReturnRule.DONE
    moves: bool = True
    logs_life: bool = True
