"""Print the JSON schema of the YAML file, for editors: python -m modules.run.schema > modules/config/schema.json

Knows: how JSON is laid out. Refuses to know: the keys.
"""

import json

from modules.config.schema import json_schema

print(json.dumps(json_schema(), indent=2))
