"""Reading of a quantization_config: what is not supported is refused by name."""

from collections.abc import Mapping
from typing import Any

from octavo.models.config import ConfigError


class Setting:
    """One reader of quantization_config, whose errors name the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """The value, which must be among these. Raises ConfigError."""
        value = self._raw.get(key)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            raise ConfigError(
                f"quantization_config.{key} is {value!r}, which is not supported; supported: "
                f"{', '.join(map(str, allowed))}"
            )
        return value

    def group_size(self) -> int:
        """Inputs that share a scale; 0 for all of a row's. Raises ConfigError."""
        size = self._raw.get("group_size", 128)
        if type(size) is not int or (size != -1 and (size < 16 or size % 16)):
            raise ConfigError(f"quantization_config.group_size is {size!r}, expected -1 or a multiple of 16")
        return max(size, 0)
