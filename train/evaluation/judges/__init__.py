"""Which judges an evaluation asks for."""

from conf.schema import EvaluateRun, JudgeName
from train.evaluation.judges.boxes import BoxJudge
from train.evaluation.judges.judge import Judge
from train.evaluation.judges.probe import CaptionProbe, ClassProbe
from train.evaluation.judges.segments import SegmentJudge

JUDGES: dict[JudgeName, type[Judge]] = {
    JudgeName.classes: ClassProbe,
    JudgeName.boxes: BoxJudge,
    JudgeName.segments: SegmentJudge,
}


def wanted_judges(cfg: EvaluateRun) -> list[type[Judge]]:
    """The kinds of judges that the options name, in their order."""
    return [CaptionProbe] * cfg.prompt_following + [JUDGES[name] for name in cfg.judges]
