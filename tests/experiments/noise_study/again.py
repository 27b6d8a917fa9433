"""What each study promises of its folder."""

from experiments import records
from experiments.__main__ import main


def assert_made_again(study, folder, capsys):
    """The table is that of the summary, and the lost picture is drawn again, from the records."""
    from matplotlib import image

    rows = records.read_object(folder / "summary.json")[study.name]
    path = folder / f"{study.name}.png"
    picture = image.imread(path)
    path.unlink()
    main(["noise-study", study.name, "--report", "--out", str(folder)])
    assert capsys.readouterr().out.strip() == study.table(rows)
    assert (image.imread(path) == picture).all()
