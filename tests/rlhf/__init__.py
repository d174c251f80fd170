import pytest

# So that what fails in a helper shows its values, as in a test.
pytest.register_assert_rewrite("tests.rlhf.helpers")
