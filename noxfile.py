"""The checks over every supported Python, and the C side under sanitisers. Only CI insists on all of them."""

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

nox.options.sessions = ["tests", "lint", "types", "docs"]


def install(session: nox.Session, *groups: str, **kwargs: dict[str, str]) -> None:
    session.install(".", *(f"--group={group}" for group in groups), **kwargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("--group=lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=[PYTHONS[0], PYTHONS[-1]])
def types(session: nox.Session) -> None:
    install(session, "test", "lint")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    install(session, "docs")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-E", "docs/sphinx", "docs/sphinx/_build/html")


@nox.session(python=PYTHONS)
def trio_suite(session: nox.Session) -> None:
    """trio's own tests, run on the ring."""
    install(session, "trio-suite")
    session.run("python", "tests/interop/run_trio_suite.py", *session.posargs)


@nox.session(python=PYTHONS)
def interop(session: nox.Session) -> None:
    """Other people's packages, unchanged, on the ring."""
    install(session, "interop")
    session.run("pytest", "tests/interop", *session.posargs)


@nox.session
def asan(session: nox.Session) -> None:
    """The C side under AddressSanitizer and UBSan; leaks are not looked for, CPython has its own at exit."""
    install(session, "test", env={"TRIO_URING_SANITIZE": "address"})
    library = session.run("gcc", "-print-file-name=libasan.so", external=True, silent=True)
    env = {"LD_PRELOAD": str(library).strip(), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    # --capture=sys: what the sanitisers write to file descriptor 2 must not be swallowed.
    session.run(
        "pytest",
        "--capture=sys",
        "tests/unit",
        "tests/contract/test_alike.py",
        "tests/contract/test_socket_semantics.py",
        "tests/stress/test_socket_races.py",
        "tests/stress/test_teardown.py",
        *session.posargs,
        env=env,
    )
