"""What a rank needs of its device's memory, by arithmetic alone: model states, activations, and
what engines add.

A step is walked through: the forward passes of teacher and student, the backward pass part by part
(activations go while gradients come), the update, the teacher's update; the images of the next
micro-batch are there meanwhile. `footprint` gives the bytes of each of these moments, by what they
are. Everything here follows from sizes and from how the
engines work (torch 2.13, DeepSpeed 0.19); nothing is allocated. tests/test_plan.py holds it to live
tensors of real ranks.

Not in it: what the device's driver, its communication library and a fragmented allocator take on
top, and kernels that `torch.compile` fuses (which keep less).
"""

from __future__ import annotations

from dataclasses import dataclass

from rcmae.models.activations import bytes_of
from rcmae.models.cost import StepCost
from rcmae.planning.states import MemorySettings, engine_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, by moment of a step and by what they are.

    Every moment has all that is resident.
    """

    resident: dict[str, float]
    moments: dict[str, dict[str, float]]
    host: float  # bytes of host memory that hold model states

    @property
    def peak(self) -> float:
        """Bytes at the highest moment."""
        return max(sum(parts.values()) for parts in self.moments.values())

    @property
    def when(self) -> str:
        """The highest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> dict[str, float]:
        """Bytes at the highest moment by what they are."""
        return self.moments[self.when]


def footprint(cost: StepCost, settings: MemorySettings) -> Footprint:
    """The memory of one rank.

    Args:
        cost: of the step, for one image.
        settings: how it is trained.
    """
    step = _Step(cost, settings)
    step.forward()
    step.backward()
    step.update()
    return Footprint(step.resident, step.moments, step.engine.host)


class _Step:
    """Walks through a step and notes each moment's bytes."""

    def __init__(self, cost: StepCost, settings: MemorySettings) -> None:
        self.cost = cost
        self.settings = settings
        self.engine = engine_bytes(cost.student, cost.teacher, settings)
        self.parts = cost.parts
        self.params = sum(part.params for part in self.parts)
        self.moments: dict[str, dict[str, float]] = {}
        tables = sum(table.numel() * table.element_size() for table in cost.student.buffers())
        self.resident = {**self.engine.resident, "activations": 0.0}
        self.resident["weights"] += tables * (2 if cost.teacher else 1)
        self.resident["weights"] += cost.frozen_params * bytes_of(settings.precision)
        self.ahead = settings.ahead * settings.per_device * cost.ahead_bytes
        self.batch = settings.per_device * cost.input_bytes + self.ahead
        gradients = self.engine.gradients
        several = settings.accumulation > 1
        self.carried = gradients.carried if several else 0.0
        self.grown = gradients.regrown if several else gradients.grown

    def moment(self, name: str, **more: float) -> None:
        """Note a moment: what is resident, and more of some kinds."""
        self.moments[name] = {
            kind: size + more.get(kind, 0.0) for kind, size in self.resident.items()
        }

    def forward(self) -> None:
        """Activations pile up. A teacher or a frozen encoder runs before the student; a teacher
        whose weights arrive meanwhile runs before the loss.
        """
        last = self.settings.teacher_arrives and bool(self.cost.teacher)
        if not last:
            self._forward_beside(0.0)
        gathered = self.engine.gathered
        waiting = self.settings.per_device * self.cost.waiting_bytes
        saved = 0.0
        behind = before = 0  # parameters of the part before, of all before
        for part in self.parts:
            is_loss = part.name == "loss"
            if is_loss and last:
                self._forward_beside(saved)
            saved += part.saved
            passing = part.passing if is_loss else 0.0
            waits = waiting if is_loss or not last else 0.0
            # its parameters are copied out of a buffer while the last part's buffer still lies
            # there
            self.moment(
                f"forward, {part.name}",
                gradients=self.carried,
                communication=gathered.student
                + gathered.kept * before
                + gathered.part * (2 * part.params + behind),
                activations=self.batch + waits + self.settings.per_device * (saved + passing),
            )
            behind = part.params
            before += part.params

    def _forward_beside(self, saved: float) -> None:
        """Of a teacher or a frozen encoder: it keeps nothing; its parameters are gathered and its
        widest layer is alive, beside the bytes an image that the student saved.
        """
        if not self.cost.beside_bytes:
            return
        self.moment(
            "teacher's forward" if self.cost.teacher else "encoder's forward",
            gradients=self.carried,
            communication=self.engine.gathered.teacher,
            activations=self.batch + self.settings.per_device * (saved + self.cost.beside_bytes),
        )

    def backward(self) -> None:
        """Activations go while gradients come, part by part from the loss on."""
        saved = sum(part.saved for part in self.parts)
        done = 0  # parameters whose gradients are there
        for index in reversed(range(len(self.parts))):
            part = self.parts[index]
            self._backward_of(index, done, saved)
            saved -= part.saved
            if self.engine.gradients.leaving:
                self._reduction_of(index, done, saved)
            done += part.params
        if self.engine.buckets.elements:
            last = self.params % self.engine.buckets.elements
            self.moment(
                "last bucket",
                gradients=self.carried + self.grown * (1 - last / self.params),
                communication=self.engine.gathered.student
                + self.engine.buckets.bytes
                + self.engine.buckets.flushed * last,
                activations=self.batch,
            )

    def _backward_of(self, index: int, before: int, saved: float) -> None:
        engine = self.engine
        part = self.parts[index]
        done = before + part.params
        reduced, flushed = done, 0  # elements
        if engine.buckets.elements:
            # gradients arrive with each full bucket; a flush holds copies of one
            full = done // engine.buckets.elements
            if full > before // engine.buckets.elements:
                flushed = engine.buckets.elements
            reduced = full * engine.buckets.elements - flushed
        within = before if engine.gradients.part else reduced
        buckets = engine.buckets.bytes if done else 0.0  # they come with the first gradient
        self.moment(
            f"backward, {part.name}",
            gradients=self.carried + self.grown * within / self.params,
            communication=engine.gathered.student
            + buckets
            + engine.buckets.flushed * flushed
            + self._gathered_until(index)
            + engine.gradients.part * part.params
            + engine.gradients.leaving * self._params_of(index + 1),
            activations=self.batch + self.settings.per_device * (saved + part.passing),
        )

    def _reduction_of(self, index: int, before: int, saved: float) -> None:
        engine = self.engine
        part = self.parts[index]
        # else `carried` has them
        whole = engine.gradients.part if self.settings.accumulation == 1 else 0.0
        self.moment(
            f"reduction, {part.name}",
            gradients=self.carried + self.grown * before / self.params,
            communication=self._gathered_until(index)
            - engine.gathered.part * part.params
            + (whole + engine.gradients.leaving) * part.params,
            activations=self.batch + self.settings.per_device * saved,
        )

    def _gathered_until(self, index: int) -> float:
        """Bytes of weights that are gathered while a backward pass is in a part: its own, and those
        of the next that it comes to, or of all, where they stay gathered.
        """
        gathered = self.engine.gathered
        if gathered.kept:
            return gathered.kept * sum(part.params for part in self.parts[: index + 1])
        return gathered.part * (self.parts[index].params + self._params_of(index - 1))

    def _params_of(self, index: int) -> int:
        """Parameters of a part; 0 beyond the ends."""
        return self.parts[index].params if 0 <= index < len(self.parts) else 0

    def update(self) -> None:
        """The end of the backward pass, the optimizer's step and the teacher's."""
        self.moment(
            "reduction",
            gradients=self.carried + self.grown,
            communication=self.engine.reducing,
            activations=self.batch,
        )
        ahead = self.ahead
        self.moment("update", gradients=self.engine.updating, activations=ahead)
        self.moment("teacher's update", teacher=self.engine.publishing, activations=ahead)
