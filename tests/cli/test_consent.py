"""Code that a spec names runs only with somebody's word."""

from __future__ import annotations

import grp
import os
import pty
import pwd
import re
import select
import signal
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import fusecli
from fusecli.cli import main
from tests.cli.conftest import PAIR, edit
from tests.nets import randomise

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml")
MARKED = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n" + PAIR
EXECUTED = Path("executed")
ALLOWING = '[tool.fusecli]\nallow-code = ["{}"]\n'


@pytest.fixture(autouse=True)
def config(tmp_path_factory, monkeypatch):
    """The user's config folder, where nothing is remembered yet."""
    place = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place))
    return place


@pytest.fixture
def folder(project):
    made = project()
    (made / "net.py").write_text(MARKED)
    return made


def test_nobody_to_ask(cli, folder):
    ended = cli(*FUSE)
    assert (ended.code, ended.out) == (3, "")
    assert "it would run Python code of the file net.py, which nobody has allowed" in ended.err
    assert "add --allow-code net.py" in ended.err
    assert not EXECUTED.exists()
    assert cli(*FUSE, "--allow-code", "net.py").code == 0  # the flag as it was printed
    assert EXECUTED.exists()


@pytest.mark.parametrize("word", ["other", "./other.py", "net", "net.py.py"])
def test_the_word_for_other_code_is_none(cli, folder, word):
    for name in ("other.py", "net.py.py"):
        Path(name).touch()
    assert cli(*FUSE, "--allow-code", word).code == 3
    assert not EXECUTED.exists()


def test_a_file_that_does_not_exist_is_a_slip(cli, folder):
    ended = cli(*FUSE, "--allow-code", "nett.py")
    assert ended.code == 2
    assert "nett.py: there is no such file to allow" in ended.err


@pytest.mark.parametrize("words", ["net.py", "other,net.py", f"other{os.pathsep}./net.py"])
def test_the_environment(cli, folder, monkeypatch, words):
    monkeypatch.setenv("FUSECLI_ALLOW_CODE", words)
    assert cli(*FUSE).code == 0


def test_the_pyproject_of_a_repository(cli, folder, monkeypatch):
    (folder / "pyproject.toml").write_text(ALLOWING.format("net.py"))
    (folder / ".git").mkdir()
    below = folder / "deep" / "deeper"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    paths = ("../../model.pt", "--spec", "../../fuse.yaml")
    assert cli("fuse", *paths).code == 0
    # The nearest one counts: a project inside does not inherit what its surroundings trust.
    (below / "pyproject.toml").write_text(ALLOWING.format("other.py"))
    assert cli("fuse", *paths, "--force").code == 3


@pytest.mark.parametrize("text", ["[tool.fusecli\n", '[tool.fusecli]\nallow-code = "net.py"\n'])
def test_a_pyproject_that_cannot_be_read(cli, folder, text):
    Path("pyproject.toml").write_text(text)
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "pyproject.toml" in ended.err


def test_a_package_covers_what_lies_in_it(cli, project):
    folder = project()
    (folder / "trustednet").mkdir()
    (folder / "trustednet" / "__init__.py").touch()
    (folder / "trustednet" / "models.py").write_text(PAIR)
    edit(folder / "fuse.yaml", ("net.py:build", "trustednet.models:build"))
    ended = cli(*FUSE)
    assert ended.code == 3
    assert "the package trustednet" in ended.err
    assert "add --allow-code trustednet" in ended.err
    assert cli(*FUSE, "--allow-code", "trusted").code == 3
    assert cli(*FUSE, "--allow-code", "trustednet").code == 0


def test_the_printed_command_carries_the_flags(cli, folder):
    report = cli(*FUSE, "--allow-code", "net.py", "--report", "json=-").report
    assert report["next_step"].endswith("--spec fuse.yaml --allow-code net.py")


BOMB = """
import torch
from pathlib import Path

class Bomb:
    def __reduce__(self):
        return (exec, ("from pathlib import Path; Path('executed').touch()",))

torch.save({"conv.weight": torch.ones(1), "bomb": Bomb()}, "model.pt")
"""


def test_a_pickle_never_runs_by_itself(cli, folder):
    exec(BOMB, {})
    ended = cli(*FUSE, "--allow-code", "net.py", "--report", "json=-")
    assert (ended.code, ended.report["exit_code"]) == (3, 3)
    assert "builtins.exec" in ended.err
    assert not EXECUTED.exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.save(torch.nn.Linear(2, 2), "model.pt"), "whole pickled module"),
        (lambda: torch.save({"a": torch.ones(1), "b": {1, 2}, "c": Path("x")}, "model.pt"), "pickle needs"),
    ],
)
def test_pickles_that_need_code_say_what_they_need(cli, folder, make, said):
    make()
    ended = cli(*FUSE, "--allow-code", "net.py")
    assert ended.code == 3
    assert said in ended.err
    assert "--allow-pickle" in ended.err


def on_a_terminal(answer: str, *words: str, program: Callable[[], object] = main) -> tuple[int, str]:
    """Runs the program on a terminal of its own, answers its question, and returns exit code and screen.

    In a copy of this process: torch is imported already.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks where there are threads; none of them holds what is needed
        process, controller = pty.fork()
    if process == 0:
        _in_the_child(words, program)
    screen, press, patience = b"", 0.0, time.monotonic() + 60
    while (now := time.monotonic()) < patience:
        if b"[y/N] " in screen and now >= press:
            os.write(controller, answer.encode())
            # A signal that falls between Python's last look and the read that waits is seen when the read
            # returns: so Ctrl-C is pressed again, as a person would. Other answers wait to be read.
            press = now + 2 if answer == "\x03" else patience
        if select.select([controller], [], [], 0.1)[0]:
            try:
                screen += os.read(controller, 65536)
            except OSError:  # the program has closed its terminal
                break
    os.close(controller)  # which ends a program that still waits
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), screen.decode()


def _in_the_child(words: tuple[str, ...], program: Callable[[], object]) -> NoReturn:
    code = 1
    # A job that a shell has put into the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        os.environ.update(COLUMNS="80", TERM="xterm")
        sys.argv = ["fusecli", *words]
        sys.path.insert(0, str(Path.cwd()))
        program()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 3), ("\n", 3), ("\x04", 3)])
def test_the_question(folder, answer, code):
    ended, screen = on_a_terminal(answer, *FUSE)
    assert ended == code, screen
    asked = screen.index("The spec names Python code of net.py. To run it is to trust it.")
    question = screen.index("Run it? [y/N] ")
    assert asked < question
    # Nothing repaints the line while somebody is reading it.
    assert "\x1b[2K" not in screen[asked:question]
    assert EXECUTED.exists() == (code == 0)
    if code == 0:
        assert "--allow-code" in screen  # in the command that verifies again
    else:
        assert "add --allow-code net.py" in " ".join(screen.split())


def test_ctrl_c_at_the_question(folder):
    ended, screen = on_a_terminal("\x03", *FUSE)
    assert ended == 130
    assert "interrupted; nothing was written" in screen
    assert "Traceback" not in screen
    assert not EXECUTED.exists()


@pytest.fixture
def download(folder):
    """A folder that allows its own code."""
    (folder / "pyproject.toml").write_text(ALLOWING.format("net.py"))
    return folder


ASKED = "pyproject.toml here lets fusecli run net.py; do you trust this folder?"
AGAIN = (*FUSE, "--force")


def line(screen: str) -> str:
    """What a terminal shows, without its styles and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen).split())


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 3), ("\n", 3), ("\x04", 3), ("\x03", 130)])
def test_a_project_that_allows_itself_is_asked_about(download, answer, code):
    ended, screen = on_a_terminal(answer, *FUSE)
    assert ended == code, screen
    assert ASKED in line(screen)
    assert screen.count("[y/N]") == 1  # one no is enough
    assert EXECUTED.exists() == (code == 0)
    assert "Traceback" not in screen
    assert ("add --allow-code net.py" in line(screen)) == (code == 3)
    assert ("trusted when asked" in line(screen)) == (code == 0)


def test_a_yes_is_remembered(download, config):
    assert on_a_terminal("y\n", *FUSE)[0] == 0
    (kept,) = (path for path in config.rglob("*") if path.is_file())
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    ended, screen = on_a_terminal("n\n", *AGAIN)
    assert (ended, "[y/N]" in screen) == (0, False)
    assert "allowed by pyproject.toml (trusted before)" in line(screen)


def test_a_no_is_not_remembered(download, config):
    assert on_a_terminal("n\n", *FUSE)[0] == 3
    assert not list(config.rglob("*.json"))
    assert on_a_terminal("y\n", *FUSE)[0] == 0


def test_another_list_and_another_folder_are_asked_about_again(download, tmp_path, monkeypatch):
    assert on_a_terminal("y\n", *FUSE)[0] == 0
    Path("pyproject.toml").write_text('[tool.fusecli]\nallow-code = ["net.py", "other.py"]\n')
    ended, screen = on_a_terminal("n\n", *AGAIN)
    assert ended == 3
    assert "lets fusecli run net.py, other.py; do you trust this folder?" in line(screen)
    Path("pyproject.toml").write_text(ALLOWING.format("net.py") + "[project]\nname = 'x'\n")
    assert on_a_terminal("n\n", *AGAIN)[0] == 0  # the list is the same
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("net.py", "model.pt", "fuse.yaml", "pyproject.toml"):
        (copy / name).write_bytes(Path(name).read_bytes())
    monkeypatch.chdir(copy)
    ended, screen = on_a_terminal("n\n", *FUSE)
    assert (ended, ASKED in line(screen)) == (3, True)


def test_an_answer_that_others_could_have_written_is_none(download, config):
    assert on_a_terminal("y\n", *FUSE)[0] == 0
    (kept,) = (path for path in config.rglob("*") if path.is_file())
    kept.chmod(0o666)
    ended, screen = on_a_terminal("n\n", *AGAIN)
    assert (ended, ASKED in line(screen)) == (3, True)


@pytest.mark.parametrize("named", ["config", ""])
def test_what_cannot_be_remembered_counts_once(download, monkeypatch, named):
    """A relative config folder would lie in the folder that is judged; a file where the home should be."""
    Path("home").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", named)
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    ended, screen = on_a_terminal("y\n", *FUSE)
    assert ended == 0, screen
    assert "not remembered: Not a directory" in line(screen)
    assert not Path("config").exists()
    assert on_a_terminal("n\n", *AGAIN)[0] == 3


def test_code_that_the_project_does_not_name_is_asked_about_by_itself(folder):
    Path("pyproject.toml").write_text(ALLOWING.format("other.py"))
    ended, screen = on_a_terminal("y\n", *FUSE)
    assert ended == 0
    assert "Run it? [y/N]" in screen
    assert "do you trust" not in screen
    assert "allowed by the answer to a question" in line(screen)


def test_what_was_typed_is_not_asked_about(download):
    ended, screen = on_a_terminal("n\n", *FUSE, "--allow-code", "net.py")
    assert (ended, "[y/N]" in screen) == (0, False)


def test_a_project_above_is_named_by_its_path(download, monkeypatch):
    (download / ".git").touch()  # as in a worktree, whose .git is a file
    below = download / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    ended, screen = on_a_terminal("n\n", "fuse", "../model.pt", "--spec", "../fuse.yaml")
    assert ended == 3
    assert "../pyproject.toml lets fusecli run net.py; do you trust" in line(screen)
    # A terminal breaks a long path where it must.
    assert str(download).replace("/", "") in screen.replace("/", "").replace("\r\n", "").replace(" ", "")


def test_without_a_terminal_it_counts_as_the_environment_says(cli, download, monkeypatch):
    assert cli(*FUSE).code == 0
    for said, code in (("0", 3), ("1", 0), ("", 0), ("yes", 2)):
        monkeypatch.setenv("FUSECLI_PROJECT_CONSENT", said)
        ended = cli(*AGAIN)
        assert ended.code == code, said
    assert "FUSECLI_PROJECT_CONSENT: 'yes' is neither 0 nor 1" in ended.err


def test_on_a_terminal_the_environment_answers(download, monkeypatch):
    monkeypatch.setenv("FUSECLI_PROJECT_CONSENT", "1")
    ended, screen = on_a_terminal("n\n", *FUSE)
    assert (ended, "[y/N]" in screen) == (0, False)
    assert "pyproject.toml (FUSECLI_PROJECT_CONSENT=1)" in line(screen)
    monkeypatch.setenv("FUSECLI_PROJECT_CONSENT", "0")
    ended, screen = on_a_terminal("n\n", *AGAIN)
    assert (ended, "do you trust" in screen, "Run it? [y/N]" in screen) == (3, False, True)


def test_the_search_ends_at_the_repository_or_at_the_working_folder(cli, download, monkeypatch):
    below = download / "deep" / "deeper"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    fuse = ("fuse", "../../model.pt", "--spec", "../../fuse.yaml", "--force")
    assert cli(*fuse).code == 3  # no repository: whoever wrote the folders above has said nothing of this one
    (download / "deep" / ".git").mkdir()
    assert cli(*fuse).code == 3  # it lies above the repository
    (download / "deep" / ".git").rmdir()
    (download / ".git").mkdir()
    assert cli(*fuse).code == 0


def made_by_others(path: Path, how: str) -> None:
    if how == "mode":
        path.chmod(0o777 if path.is_dir() else 0o666)
    elif os.geteuid() != 0:
        pytest.skip("only root gives files away")
    elif how == "owner":
        os.chown(path, 12345, -1)
    else:
        os.chown(path, -1, 12345)
        path.chmod(0o775 if path.is_dir() else 0o664)


@pytest.mark.parametrize("name", [".", "pyproject.toml"])
@pytest.mark.parametrize("how", ["mode", "owner", "group"])
def test_what_others_could_have_written_does_not_count(cli, download, name, how):
    assert cli(*FUSE).code == 0
    made_by_others(Path(name), how)
    ended = cli(*AGAIN)
    assert ended.code == 3
    assert "pyproject.toml does not count: " in ended.err
    assert cli(*AGAIN, "--allow-code", "net.py").code == 0


def test_a_link_to_what_others_could_have_written_does_not_count(cli, download):
    open_to_all = download / "open"
    open_to_all.mkdir()
    Path("pyproject.toml").rename(open_to_all / "pyproject.toml")
    Path("pyproject.toml").symlink_to(open_to_all / "pyproject.toml")
    assert cli(*FUSE).code == 0
    open_to_all.chmod(0o777)
    assert cli(*AGAIN).code == 3


def test_the_group_that_is_the_users_own_is_nobody_else(cli, download, monkeypatch):
    """Many systems give each user a group, and make what they write writable by it."""
    user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(os.getegid())
    for path in (download, download / "pyproject.toml"):
        path.chmod(0o775 if path.is_dir() else 0o664)
    for name, members, code in ((user.pw_name, [], 0), (user.pw_name, ["other"], 3), ("staff", [], 3)):
        entry = grp.struct_group((name, "x", group.gr_gid, members))
        monkeypatch.setattr(grp, "getgrgid", lambda _, entry=entry: entry)
        assert cli(*AGAIN).code == code, entry


def test_a_list_that_may_not_be_read(cli, download, monkeypatch):
    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "pyproject.toml: cannot be read" in ended.err


@pytest.mark.parametrize(
    ("words", "environment", "by"),
    [
        (("--allow-code", "net.py"), "", "the command line"),
        (("--model", "net.py:build"), "", "the command line"),
        ((), "net.py", "FUSECLI_ALLOW_CODE"),
        ((), "", "pyproject.toml (there was nobody to ask)"),
    ],
)
def test_every_report_names_where_consent_came_from(cli, download, monkeypatch, words, environment, by):
    if environment:
        monkeypatch.setenv("FUSECLI_ALLOW_CODE", environment)
    ended = cli(*FUSE, *words)
    assert f"net.py, allowed by {by}" in line(ended.out)
    assert "Lost or changed" not in ended.out
    for command in (AGAIN, ("verify", "model.pt", "model.fused.safetensors", "--spec", "fuse.yaml")):
        report = cli(*command, *words, "--report", "json=-").report
        assert {"kind": "consent", "where": "net.py", "what": f"allowed by {by}"} in report["ledger"]
    markdown = cli(*AGAIN, *words, "--report", "md=-").out
    assert f"net.py, allowed by {by}" in markdown.replace("\\", "").replace("`", "")
    spec = ("plan", "model.pt", "--spec", "fuse.yaml", "-o", "found.yaml", "--report", "json=-")
    assert f"allowed by {by}" in str(cli(*spec, *words).report["ledger"])


def test_the_report_of_a_failure_names_it_too(cli, download):
    (download / "net.py").write_text(MARKED.replace("return", "raise SystemError() #"))
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == 2
    (entry,) = ended.report["ledger"]
    assert (entry["kind"], entry["where"]) == ("consent", "net.py")


def test_nothing_is_named_where_no_code_was_needed(cli, download):
    edit(Path("fuse.yaml"), ('"model": {"factory": "net.py:build"}, ', ""))
    ended = cli(*FUSE, "--assume-eps", "1e-5", "--report", "json=-")
    assert ended.code == 0, ended.err
    assert "consent" not in [entry["kind"] for entry in ended.report["ledger"]]


FUSER = """
def glue(is_qat, layer, norm):
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    return fuse_conv_bn_eval(layer, norm)
"""


def of_the_library() -> None:
    mapping = {"sequence": ["torch.nn.Conv2d", "torch.nn.BatchNorm2d"], "fuser": "net.py:glue"}
    model = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(3, 6, 3), bn=torch.nn.BatchNorm2d(6)))
    spec = {"groups": [["conv", "bn"]], "extra_mappings": [mapping]}
    outcome = fusecli.fuse(randomise(model, 0).eval(), torch.randn(2, 3, 8, 8), spec=spec)
    print([entry.what for entry in outcome.ledger if entry.kind == "consent"])


def test_a_call_of_the_library_never_asks(download, monkeypatch):
    (download / "net.py").write_text(MARKED + FUSER)
    ended, screen = on_a_terminal("n\n", program=of_the_library)
    assert ended == 0, screen
    assert "allowed by pyproject.toml (there was nobody to ask)" in line(screen)
    assert "[y/N]" not in screen
    monkeypatch.setenv("FUSECLI_PROJECT_CONSENT", "0")
    ended, screen = on_a_terminal("n\n", program=of_the_library)
    assert (ended, "UnsafeError" in screen) == (1, True)


def test_a_program_without_a_stdin(cli, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as `<&-` does
    assert cli(*FUSE).code == 3


def test_a_screen_that_is_none_gets_no_question(cli, download, monkeypatch):
    """FORCE_COLOR says which colours are wanted, not that somebody reads them."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    ended = cli(*FUSE)
    assert (ended.code, "[y/N]" in ended.err) == (0, False)
