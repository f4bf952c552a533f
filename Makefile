# A menu: the logic is in xtask/ (`cargo xtask --help`).
.PHONY: build test demo check deny advisories e2e setup clean

build: ; @cargo xtask build
test:  ; @cargo xtask test
demo:  ; @cargo xtask demo
# Format, lints, structure: what needs no guest and runs no test.
check: ; @cargo xtask check
# Licences and sources of dependencies.
deny:  ; @cargo xtask deny
# Known holes of dependencies: fetches the RustSec advisory database, or takes the clone in $COFFERDAM_ADVISORIES.
advisories: ; @cargo xtask advisories
# The tests that boot guests, alone.
e2e:   ; @cargo xtask e2e
setup: ; @cargo xtask setup
# The kernel cache outside the tree stays.
clean: ; @cargo clean
