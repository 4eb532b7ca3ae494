"""What a report shows of agents beyond tables: a video of the worst edit beside the unedited agent."""

from __future__ import annotations

from pathlib import Path

from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.behaviour.agents.running import Setting
from dt_lens.behaviour.arms import Arms
from dt_lens.behaviour.video.video import SideBySide, side_by_side
from dt_lens.report.page import Section, Video

__all__ = ["video_section"]


def video_section(arms: Arms, setting: Setting, folder: Path, wanted: bool) -> Section:
    """The worst edit in its typical episode, beside the unedited agent from the same seed; or why there is none."""
    video = _video(arms, setting, folder, wanted)
    about = (
        "The edit with the largest loss beside the unedited agent, in the episode with its median loss; both start "
        "from the same state."
    )
    return Section(
        "The worst edit beside the unedited agent",
        [
            Video(
                video.file,
                f"{about} {video.note}".strip(),
                video.reason,
                video.poster,
            )
        ],
        picture=True,
    )


def _video(arms: Arms, setting: Setting, folder: Path, wanted: bool) -> SideBySide:
    if not wanted:
        return SideBySide(None, "There is no video: it was switched off.")
    worst = arms.worst
    if worst is None:
        return SideBySide(None, f"There is no video: no edit made the mean {arms.baseline.terms.outcome} worse.")
    seed = int(arms.baseline.units[arms.typical(worst)])
    unedited = record_actions(arms.model, arms.baseline, seed, setting)
    with arms.edits[worst]:
        hit = record_actions(arms.model, arms.edited[worst], seed, setting)
    terms, place = arms.baseline.terms, arms.typical(worst)
    return side_by_side(
        setting.made.spec,
        unedited,
        hit,
        seed=seed,
        file=folder / "worst.mp4",
        captions=("unedited", f"{arms.names[worst]} edited"),
        environment_kwargs=setting.made.kwargs,
        failed=(bool(arms.baseline.failed[place]), bool(arms.edited[worst].failed[place])),
        ended="fell" if terms.failure == "terminated" and not terms.failure_note else "ended",
    )
