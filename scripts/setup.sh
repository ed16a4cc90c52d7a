# Sourced by the launchers and by tests/run.sh, from the repository's root: use the active virtual
# or conda environment, else .venv; install the given requirements files if something in them is
# missing or too old. SETUP=0 leaves everything as it is, for clusters that set up in their own way.
#
#   source scripts/setup.sh requirements.txt

NEW_ENOUGH="import sys; sys.exit(sys.version_info < (3, 11))"
if [ "${SETUP:-1}" != 0 ]; then
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ -e .venv/bin/python ] || [ -L .venv/bin/python ]; then
      .venv/bin/python -c "$NEW_ENOUGH" 2> /dev/null || { echo "error: .venv: its Python is gone or \
older than 3.11; remove it, or activate another environment" >&2; exit 2; }
    fi
    [ -x .venv/bin/pip ] || python3 -m venv .venv  # no pip: an earlier try broke off
    export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
  fi
  python -c "$NEW_ENOUGH" ||
    { echo "error: $(command -v python): not Python 3.11 or newer; put one on PATH" >&2; exit 2; }
  if ! python - "$@" 2>/dev/null <<'CHECK'
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

for file in sys.argv[1:]:
    for line in open(file, encoding="utf-8"):
        if text := line.partition("#")[0].strip():
            requirement = Requirement(text)
            installed = version(requirement.name)
            assert requirement.specifier.contains(installed, prereleases=True)
CHECK
  then
    echo "installing $* into $(command -v python)"
    # Compiling all that there is takes a minute; of it, a tenth is ever imported, and compiled then.
    python -m pip install --quiet --no-compile $(printf -- '-r %s ' "$@")
  fi
fi
