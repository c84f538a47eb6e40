"""Everything that travels inside a checkpoint: a flat folder whose files import only torch, transformers and siblings.

Remote code is copied file by file, so nothing here may import the rest of the package.
"""
