from pathlib import Path

import pytest

from pipeline.config import Preset, load_preset
from pipeline.planning.fitting import disk_choices, require_disk, require_room
from pipeline.planning.sizes import Site, Subject
from storage.errors import MemoryBudgetExceeded, StorageFull

POST = Site(hook_name="blocks.0.mlp.hook_post", d_in=24)
OUT = Site(hook_name="blocks.0.hook_mlp_out", d_in=16)
ROOT = Path("artifacts")


@pytest.fixture
def subject(tiny_preset: Path) -> Subject:
    preset: Preset = load_preset(str(tiny_preset))
    return Subject(preset, (POST,))


def test_a_run_that_fits_is_not_refused(subject: Subject):
    needed = subject.plan().disk_bytes
    require_disk(subject, disk_choices(subject, OUT, needed), needed, ROOT)
    needs = subject.memory_needs(model_width=96, d_vocab=64, workers=1)
    require_room(subject, needs, max(sum(parts.values()) for parts in needs.values()))


def test_a_full_disk_is_told_with_each_choice_and_what_it_needs(subject: Subject):
    needed = subject.plan().disk_bytes
    choices = disk_choices(subject, OUT, needed - 1)
    planned = {
        "harvest.encoding=uint8": subject.changed(harvest={"encoding": "uint8"}),
        "harvest.hook_name=blocks.0.hook_mlp_out": subject.at(OUT),
        "harvest.hook_name=blocks.0.hook_mlp_out harvest.encoding=uint8": subject.at(OUT).changed(
            harvest={"encoding": "uint8"}
        ),
        "harvest.n_windows=8": subject.changed(harvest={"n_windows": 8}),
        "train.source=live with harvest.n_windows=1": subject.changed(harvest={"n_windows": 1}),
    }
    assert {choice.settings: choice.bytes for choice in choices} == {
        settings: other.plan().disk_bytes for settings, other in planned.items()
    }
    with pytest.raises(StorageFull) as refused:
        require_disk(subject, choices, needed - 1, ROOT)
    assert (refused.value.needed_bytes, refused.value.free_bytes) == (needed, needed - 1)
    assert all(settings in str(refused.value) for settings in planned)
    assert "would not fit either" not in str(refused.value)
    assert f"{8 * 256 * 16:,} tokens" in str(refused.value)


@pytest.mark.parametrize("windows", [1, 4, 8])
def test_the_number_of_windows_named_is_the_largest_that_fits(subject: Subject, windows: int):
    free = subject.changed(harvest={"n_windows": windows}).plan().disk_bytes
    (choice,) = [one for one in disk_choices(subject, None, free) if "n_windows" in one.settings.split()[0]]
    assert choice.settings == f"harvest.n_windows={windows}"
    assert choice.bytes == free


def test_choices_that_would_not_fit_either_say_so(subject: Subject):
    with pytest.raises(StorageFull) as refused:
        require_disk(subject, disk_choices(subject, OUT, 1000), 1000, ROOT)
    assert str(refused.value).count("would not fit either") == len(disk_choices(subject, OUT, 1000))


def test_stages_made_already_need_no_disk(subject: Subject):
    made = Subject(subject.preset, subject.sites, None, ("tokenize", "harvest"))
    free = subject.plan().training.working_bytes
    require_disk(made, [], free, ROOT)
    with pytest.raises(StorageFull):
        require_disk(subject, [], free, ROOT)


def test_another_site_is_offered_only_where_it_is_narrower(subject: Subject):
    assert not any("hook_mlp_out" in choice.settings for choice in disk_choices(subject, None, 0))


def test_a_harvest_too_large_for_the_memory_names_its_window(subject: Subject):
    def needs(window_prompts: int) -> dict[str, dict[str, int]]:
        other = subject.changed(harvest={"window_prompts": window_prompts})
        return other.memory_needs(model_width=96, d_vocab=64, workers=1)

    room = sum(needs(128)["harvest"].values()) + 1000  # rounding; a chunk more takes 200,000 bytes
    with pytest.raises(MemoryBudgetExceeded, match=r"harvest does not fit .* harvest\.window_prompts=128 "):
        require_room(subject, needs(256), room)


def test_a_training_too_large_for_the_memory_names_its_pools(subject: Subject):
    needs = subject.memory_needs(model_width=96, d_vocab=64, workers=1)
    made = Subject(subject.preset, subject.sites, None, ("tokenize", "harvest"))
    with pytest.raises(MemoryBudgetExceeded, match=r"train does not fit .* train\.pool_rows=640"):
        require_room(made, needs, sum(needs["train"].values()) - 1)
