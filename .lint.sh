PATH=/tmp/check-venv/bin:/tmp/suite-venv/bin:$PATH
mypy --strict --ignore-missing-imports milter_sysuser.py | tail -5; ruff check --line-length 120 --select E,F,W,B --ignore E402 --target-version py39 milter_sysuser.py | tail -20
