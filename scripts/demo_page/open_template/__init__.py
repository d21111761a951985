"""For the demo only: lets an address open a template, also one with spaces in its name and on older frontends."""

WEB_DIRECTORY = "./web"
NODE_CLASS_MAPPINGS: dict[str, type] = {}
