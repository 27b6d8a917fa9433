"""How XLA makes programs that run for milliseconds, as tests and pages do: it compiles quickly."""

import jax

# Of XLA's two ways to make loops, the one that compiles faster, and each program in one piece: to
# cut it up for several threads takes longer than they save. XLA stops at a flag that it does not
# know, and versions of jax that are not out yet may not know these.
_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
QUICKLY = _FLAGS if jax.__version_info__ < (0, 11) else ""
