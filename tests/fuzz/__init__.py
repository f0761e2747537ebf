# SPDX-License-Identifier: Apache-2.0
"""Files from strangers, made up by a coverage-guided fuzzer; see `__main__`."""
