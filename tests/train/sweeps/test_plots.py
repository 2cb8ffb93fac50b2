"""Words of the plots of a sweep."""

from train.sweeps.plots import apart


def test_of_folders_what_tells_them_apart_is_shown() -> None:
    folders = ["runs/demo/unet/export", "runs/lcm/unet/export", "runs/a/b/unet/export"]
    assert list(apart(folders).values()) == ["demo", "lcm", "a/b"]
    assert apart(["x/a", "x/a/a"]) == {"x/a": "x/a", "x/a/a": "x/a/a"}
    assert apart(folders[:1]) == apart(["a/b", 3]) == apart(["unipc", "lcm"]) == {}
