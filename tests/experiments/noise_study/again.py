"""The promise of each study that its table and picture can be made again from its records."""

from experiments import records
from experiments.__main__ import main


def assert_made_again(study, folder, capsys):
    """Asserts that ``--report`` prints the summary's table and draws a lost picture again.

    Args:
        study: the study.
        folder: its finished folder, whose picture this deletes.
        capsys: pytest's fixture.
    """
    from matplotlib import image

    rows = records.read_object(folder / "summary.json")[study.name]
    path = folder / f"{study.name}.png"
    picture = image.imread(path)
    path.unlink()
    main(["noise-study", study.name, "--report", "--out", str(folder)])
    assert capsys.readouterr().out.strip() == study.table(rows)
    assert (image.imread(path) == picture).all()
