"""The engine: request, block pool, prefix cache, scheduler and plan (pure Python), and the processes around them."""
