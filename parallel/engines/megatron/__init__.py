"""The Megatron-Core engine. Imported where it is chosen only: `megatron.core` takes seconds."""
