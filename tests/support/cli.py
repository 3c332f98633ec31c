"""The command line as a user runs it."""

from typer.testing import CliRunner

from pushforward.cli import app
from pushforward.errors import PushforwardError

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def refused(result, message):
    assert result.exit_code != 0
    assert isinstance(result.exception, PushforwardError), result.exception
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
