from tests.convert.conftest import hf_modules_cache, tokenizer, weights  # noqa: F401
from tests.devices.models import device_tokenizer  # noqa: F401
