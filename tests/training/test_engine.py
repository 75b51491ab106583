"""The engine: it learns, in both dialects, and a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import CheckpointError, DataError, TrainingError, UsageError
from graphprune.files import write_atomic
from graphprune.program import Dialect, Program
from graphprune.training import Hook, Moment, Outcome, Recipe, Task, Trainer
from tests.training.networks import Stop, StopAfter, children, data, files, norm_free, program

RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, precision="float32")


def fit(program: Program, recipe: Recipe = RECIPE, **options: Any) -> Outcome:
    return Trainer(program=program, recipe=recipe, data=data(), **options).fit()


def tensors(program: Program) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in program.named_tensors()}


def weight(program: Program, name: str = "fc.weight") -> nn.Parameter:
    return program.module.get_parameter(name)


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_helper_that_asserts_fails_on_a_wrong_answer() -> None:
    a = {"w": torch.zeros(2)}
    with pytest.raises(AssertionError, match="w"):
        assert_equal(a, {"w": torch.tensor([0.0, 1e-9])})


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_loss_falls_and_the_graph_stays(dialect: Dialect) -> None:
    trained = program(dialect)
    text = str(trained)
    outcome = fit(trained, Recipe(epochs=12, batch_size=16, lr=0.05, precision="float32"))
    losses = [line["loss"] for line in outcome.history]
    assert losses[-1] < 0.5 * losses[0]
    assert outcome.last["test_accuracy"] >= 0.8
    assert str(trained) == text
    assert not any(module.training for module in trained.module.modules())
    assert all(p.grad is None for p in trained.module.parameters())


def test_both_dialects_learn_the_same() -> None:
    # Without dropout, whose random numbers come in another order.
    both = [program(dialect, dropout=0.0) for dialect in ("fx", "export")]
    for one in both:
        fit(one)
    a, b = map(tensors, both)
    assert not torch.equal(a["bn1.running_mean"], program().module.get_buffer("bn1.running_mean"))
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    for dialect in ("fx", "export"):
        plain, dropped = program(dialect, dropout=0.0), program(dialect, dropout=0.5)
        fit(plain)
        fit(dropped)
        assert not torch.equal(weight(plain), weight(dropped))
        x = torch.randn(3, 1, 8, 8)
        assert torch.equal(dropped.module(x), dropped.module(x))


def test_it_equals_a_plain_loop_of_torch() -> None:
    from graphprune.training.batches import Batches

    trained = program(dropout=0.0)
    twin = program(dropout=0.0).module
    fit(trained, Recipe(epochs=2, batch_size=32, lr=0.05, schedule="constant", precision="float32"))
    twin.train()
    decay = [p for p in twin.parameters() if p.dim() > 1]
    others = [p for p in twin.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    collate = torch.utils.data.default_collate
    batches = Batches(data().split("train"), 32, seed=0, collate=collate)
    for epoch in range(2):
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            optimizer.step()
    for (name, a), (_, b) in zip(
        trained.module.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_the_seed_decides_and_nothing_else_is_disturbed() -> None:
    random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), torch.rand(1))
    random.seed(5)
    torch.manual_seed(5)
    runs = []
    for seed in (0, 0, 1):
        runs.append(program())
        fit(runs[-1], seed=seed)
    assert_equal(tensors(runs[0]), tensors(runs[1]))
    assert not torch.equal(weight(runs[0]), weight(runs[2]))
    assert (random.random(), torch.rand(1)) == expected


def test_no_epochs_change_nothing() -> None:
    trained = program()
    before = tensors(trained)
    outcome = fit(trained, Recipe(epochs=0))
    assert outcome.history == ()
    assert outcome.last == {}
    assert_equal(before, tensors(trained))


def test_distillation_pulls_towards_the_teacher() -> None:
    teacher = program(seed=3)
    before = tensors(teacher)
    students = [program(dropout=0.0, seed=4), program(dropout=0.0, seed=4)]
    for student, share in zip(students, (0.0, 1.0), strict=True):
        recipe = Recipe(epochs=6, batch_size=16, lr=0.05, distill=share, precision="float32")
        fit(student, recipe, teacher=teacher)
    x = data().split("test")[:][0]
    with torch.no_grad():
        said = teacher.module(x)
        apart = [F.mse_loss(student.module(x), said) for student in students]
    assert apart[1] < 0.5 * apart[0]
    assert_equal(before, tensors(teacher))


def test_the_average_of_weights_takes_their_place() -> None:
    plain, averaged = program(), program()
    outcome = fit(plain)
    smooth = fit(
        averaged, Recipe(epochs=2, batch_size=32, lr=0.05, average=0.9, precision="float32")
    )
    assert smooth.history[0]["loss"] == outcome.history[0]["loss"]
    assert not torch.equal(weight(plain), weight(averaged))
    from graphprune.data import evaluate

    accuracy = evaluate(averaged, data().test(40))
    assert smooth.last["test_accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_batch_norms_have_the_statistics_of_the_averaged_weights(
    dialect: Dialect, mixup: float
) -> None:
    averaged = program(dialect, dropout=0.0)
    options: dict[str, Any] = {"batch_size": 32, "lr": 0.1, "precision": "float32"}
    fit(averaged, Recipe(epochs=3, average=0.9, mixup=mixup, **options))
    # Training again with a rate of next to nothing shows the same batches in the same order.
    probe = program(dialect, dropout=0.0)
    with torch.no_grad():
        for (_, to), (_, value) in zip(
            probe.named_tensors(), averaged.named_tensors(), strict=True
        ):
            to.copy_(value)
        means = [t for name, t in probe.named_tensors() if name.endswith("running_mean")]
        assert means
        settled = [mean.clone() for mean in means]
        for mean in means:
            mean.zero_()
    seen: list[list[torch.Tensor]] = []

    class Watch(Hook):
        def after_step(self, moment: Moment) -> None:
            # running <- 0.9 * running + 0.1 * batch, from 0 on
            seen.append([mean.clone() / 0.1 for mean in means])
            for mean in means:
                mean.zero_()

    fit(probe, Recipe(epochs=1, mixup=mixup, **{**options, "lr": 1e-12}), hooks=[Watch()])
    for mean, *batches in zip(settled, *seen, strict=True):
        torch.testing.assert_close(mean, torch.stack(batches).mean(0), rtol=1e-4, atol=1e-5)


class Penalty(Hook):
    """Pulls the linear layer to zero, slowly trains the first convolution, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.seen = 0

    def parameter_options(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any] | None:
        return {"lr": 0.0} if name == "conv1.weight" else None

    def before_epoch(self, moment: Moment) -> None:
        self.calls.append(f"before {moment.epoch}")

    def extra_loss(self, moment: Moment) -> Tensor:
        return 0.5 * moment.module.get_parameter("fc.weight").square().sum()

    def after_backward(self, moment: Moment) -> None:
        gradient = moment.module.get_parameter("fc.bias").grad
        assert gradient is not None
        gradient.zero_()

    def after_step(self, moment: Moment) -> None:
        self.seen += 1
        assert moment.steps == self.seen

    def after_epoch(self, moment: Moment) -> Mapping[str, float]:
        self.calls.append(f"after {moment.epoch} at {moment.fraction}")
        return {"seen": self.seen}

    def macs(self) -> int:
        return 7

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def test_a_hook_adds_loss_options_metrics_and_state() -> None:
    hooked, plain, hook = program(), program(), Penalty()
    before = tensors(hooked)
    outcome = fit(hooked, hooks=[hook])
    fit(plain)
    after = tensors(hooked)
    assert hook.calls == ["before 0", "after 1 at 0.5", "before 1", "after 2 at 1.0"]
    assert outcome.last["seen"] == hook.seen == 6
    assert outcome.last["macs"] == 7
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert torch.equal(before["fc.bias"], after["fc.bias"])
    assert after["fc.weight"].norm() < plain.module.get_parameter("fc.weight").norm()


def test_bfloat16_computes_in_it_and_keeps_float32_weights() -> None:
    low, high = program(dropout=0.0), program(dropout=0.0)
    fit(low, Recipe(epochs=1, batch_size=32, precision="bfloat16"))
    fit(high, Recipe(epochs=1, batch_size=32, precision="float32"))
    assert all(p.dtype == torch.float32 for p in low.module.parameters())
    assert not torch.equal(weight(low), weight(high))
    torch.testing.assert_close(weight(low), weight(high), rtol=0.0, atol=0.02)


def test_an_accelerator_of_the_caller_goes_on() -> None:
    from accelerate import Accelerator

    mine = Accelerator(cpu=True, mixed_precision="bf16")
    fit(program(), Recipe(epochs=1, batch_size=32, precision="float32"))
    assert mine.mixed_precision == "bf16"
    assert mine.num_processes == 1


def test_a_graph_of_one_layout_trains_in_that_layout() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)
            self.fc = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            logits: Tensor = self.fc(x.view(x.size(0), -1))
            return logits

    from graphprune.capture import capture

    trained = capture(Flat(), torch.randn(1, 1, 8, 8))
    fit(trained)
    assert weight(trained, "conv.weight").is_contiguous()


# Interrupted runs


EVERY_STEP = Recipe(
    epochs=3, batch_size=16, lr=0.05, average=0.9, precision="float32", checkpoint_seconds=0.0
)


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("sgd", "cosine{warmup=1}"),
        ("adamw", "one-cycle"),
        ("rmsprop{momentum=0.5}", "multi-step{milestones=(1,2)}"),
        ("timm.optim:Muon{nesterov=true}", "cosine"),
    ],
)
def test_a_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, optimizer: str, schedule: str
) -> None:
    recipe = Recipe(
        epochs=3,
        batch_size=16,
        lr=0.01,
        optimizer=optimizer,
        schedule=schedule,
        average=0.9,
        precision="float32",
        checkpoint_seconds=0.0,
    )
    whole = program()
    expected = fit(whole, recipe, checkpoint=tmp_path / "whole")
    for steps in (1, 6):
        broken, rest = program(), program()
        folder = tmp_path / str(steps)
        with pytest.raises(Stop):
            fit(broken, recipe, checkpoint=folder, hooks=[StopAfter(steps)])
        # A hook's state belongs to the checkpoint, so the second run has a hook too.
        found = fit(rest, recipe, checkpoint=folder, resume=True, hooks=[StopAfter(0)])
        assert_equal(tensors(whole), tensors(rest))
        for a, b in zip(expected.history, found.history, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def _train(folder: Path, result: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    trained = program()
    fit(trained, EVERY_STEP, checkpoint=folder, resume=resume)
    with write_atomic(result) as temporary:
        torch.save(tensors(trained), temporary)


def _killed_then_resumed(tmp_path: Path, moments: int) -> None:
    """Kill a run with SIGKILL at random moments, resuming each time; the weights are those of a whole run."""
    whole = program()
    started = time.monotonic()
    fit(whole, EVERY_STEP, checkpoint=tmp_path / "whole")
    seconds = time.monotonic() - started
    generator = random.Random(7)
    context = children()
    kills = 0
    for number in range(moments):
        folder, result = tmp_path / f"run{number}", tmp_path / f"weights{number}.pt"
        for attempt in range(4):
            child = context.Process(target=_train, args=(folder, result, attempt > 0))
            child.start()
            child.join(generator.uniform(0.0, seconds) if attempt < 3 else None)
            if child.is_alive():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
            assert files(folder) <= {"state.pt", "metrics.jsonl"}
            if (folder / "state.pt").exists():
                torch.load(folder / "state.pt", weights_only=True)
        assert_equal(tensors(whole), torch.load(result, weights_only=True))
        assert not list(folder.glob(".*"))
    assert kills


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    _killed_then_resumed(tmp_path, 1)


@pytest.mark.slow
def test_ten_killed_runs_resume_to_the_same_weights(tmp_path: Path) -> None:
    _killed_then_resumed(tmp_path, 10)


def test_without_resume_a_run_starts_over(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(program(seed=1), EVERY_STEP, checkpoint=tmp_path, hooks=[StopAfter(4)])
    (tmp_path / ".state.pt.abc.tmp").write_text("half")
    afresh, whole = program(), program()
    fit(afresh, EVERY_STEP, checkpoint=tmp_path)
    fit(whole, EVERY_STEP)
    assert_equal(tensors(afresh), tensors(whole))
    assert files(tmp_path) == {"metrics.jsonl", "state.pt"}
    assert not list(tmp_path.glob(".*"))


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(program(), RECIPE, checkpoint=tmp_path, name="fine-tune")
    common: dict[str, Any] = {"checkpoint": tmp_path, "resume": True}
    with pytest.raises(CheckpointError, match="its pass is 'fine-tune', this run's is 'other'"):
        fit(program(), RECIPE, name="other", **common)
    with pytest.raises(CheckpointError, match="its weights to start from is of absolute sum"):
        fit(program(seed=1), RECIPE, name="fine-tune", **common)
    with pytest.raises(CheckpointError, match="its seed is 0, this run's is 1"):
        fit(program(), RECIPE, name="fine-tune", seed=1, **common)
    from graphprune.capture import capture

    other = capture(norm_free(), torch.randn(1, 1, 8, 8))
    with pytest.raises(
        CheckpointError, match="its program is '.*'; repeat the command|its program is"
    ):
        fit(other, RECIPE, name="fine-tune", **common)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="found a file that cannot be read"):
        fit(program(), RECIPE, checkpoint=tmp_path, resume=True)


# Refusals


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    task = Task(
        loss=lambda outputs, target: outputs.sum() * float("nan"),
        metric=lambda outputs, target: outputs.mean(),
    )
    with pytest.raises(
        TrainingError, match=r"the loss became nan in epoch 1 .*; lower lr, warm up"
    ):
        fit(program(), task=task, checkpoint=tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_weights_that_diverge_in_the_last_step_are_an_error(tmp_path: Path) -> None:
    class Breaks(Hook):
        def after_step(self, moment: Moment) -> None:
            if moment.fraction == 1.0:
                moment.module.get_parameter("fc.weight").data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="the loss on the test set became nan in epoch 2"):
        fit(program(), hooks=[Breaks()], checkpoint=tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_metric_that_is_no_number_is_null_in_the_lines(tmp_path: Path) -> None:
    task = Task(
        loss=lambda outputs, target: F.cross_entropy(outputs, target),
        metric=lambda outputs, target: outputs.sum() * float("nan"),
    )
    fit(program(), task=task, checkpoint=tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["test_metric"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "expected epochs from 0 on, found -1"),
        ({"batch_size": 0}, "expected batch_size from 1 on, found 0"),
        ({"distill": 2.0}, "expected distill between 0 and 1, found 2.0"),
        ({"average": -0.5}, "expected average between 0 and 1, found -0.5"),
        ({"lr": 0.0}, "expected lr and temperature to be positive, found lr=0.0"),
        ({"precision": "float8"}, "expected precision to be one of auto, float32, bfloat16"),
        ({"lr": 0.1, "optimizer": "adamw{lr=0.2}"}, "found lr=0.1 besides; give one of the two"),
        ({"optimizer": "sdg"}, "optimizer: expected one of .*adamw.*sgd.*, found 'sdg'"),
        (
            {"schedule": "cosinus"},
            "schedule: expected one of cosine, constant, .*, found 'cosinus'",
        ),
        ({"distill": 0.5}, "distill= and features= need a teacher, found none"),
    ],
)
def test_bad_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(program(), Recipe(**{"epochs": 1, **options}))


def test_a_program_of_a_fixed_batch_says_what_it_takes() -> None:
    import dataclasses

    fixed = dataclasses.replace(program(), dynamic_batch=False)
    with pytest.raises(UsageError, match="takes batches of 2 samples only, found 32 per process"):
        fit(fixed)
    fit(fixed, Recipe(epochs=1, batch_size=2, precision="float32"))
    few = dataclasses.replace(fixed, example_inputs=(torch.randn(200, 1, 8, 8),))
    with pytest.raises(UsageError, match="found 96 per process; .* there are 96 training samples"):
        fit(few, Recipe(epochs=1, batch_size=200))


def test_samples_that_do_not_fit() -> None:
    from graphprune.capture import capture

    tokens = capture(nn.Linear(8, 10), torch.randn(2, 8))
    with pytest.raises(DataError, match="takes samples of shape 8, the data gives 1x8x8"):
        fit(tokens)


def test_frozen_parameters_stay() -> None:
    frozen = program()
    frozen.module.get_submodule("conv1").requires_grad_(False)
    before = weight(frozen, "conv1.weight").clone()
    fit(frozen)
    assert torch.equal(weight(frozen, "conv1.weight"), before)
    frozen.module.requires_grad_(False)
    with pytest.raises(UsageError, match="expected parameters to train, found none"):
        fit(frozen)
