"""Killed in its updates, in a save and in an evaluation, a run ends as one that never was.

python -m pytest tests/test_kill_and_resume.py     (20 trials: python tests/kill_and_resume.py)
"""

import kill_and_resume


def test_a_killed_run_ends_with_the_same_bytes():
    result = kill_and_resume.main(["--trials", "1"])
    assert result["identical endings"] == 1
    [trial] = result["each trial"]
    assert [kill["killed"] for kill in trial["kills"]] == [True] * 4
