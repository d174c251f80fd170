import sys, pathlib, time
from tests.compiled import cuda
nvcc = cuda.command(cuda.cuda_home())
# one target only, for speed
import re
out=[]; i=0
for name in sys.argv[1:]:
    t=time.time()
    r = cuda.compile_file(pathlib.Path("csrc/cuda")/name, nvcc, pathlib.Path(f"/tmp/{name}.o"))
    for x in r:
        if "error" in x: print(name, "ERROR", x["error"][:3000])
        elif "kernel" in x or "target" in x:
            if x.get("spills"): print(name, {k:x[k] for k in x if k in("kernel","name","target","spills","registers","dtype","threads","ctas")})
    print(name, len(r), round(time.time()-t)); sys.stdout.flush()
