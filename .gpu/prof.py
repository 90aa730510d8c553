import sys, torch, time
sys.path.insert(0,"benchmarks"); import decode as D, argparse
import gdnfuse
from torch.profiler import profile, ProfilerActivity
@torch.no_grad()
def main(name, side):
    torch.compiler.reset()
    m=D.build(name, torch.bfloat16, "cuda")
    toks=torch.randint(0,1000,(300,1,1),device="cuda")
    d=D.Decoder(m, D.compiled(side,m,"reduce-overhead"), toks[:128].squeeze(-1).T.contiguous(), 160)
    for t in toks[:24]: d(t)
    torch.cuda.synchronize(); t0=time.perf_counter()
    for t in toks[24:56]: d(t)
    t1=time.perf_counter(); torch.cuda.synchronize(); t2=time.perf_counter()
    print(name, side, f"cpu issue {1e3*(t1-t0)/32:.3f} ms/step, wall {1e3*(t2-t0)/32:.3f}")
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for t in toks[56:60]: d(t)
        torch.cuda.synchronize()
    ev=[e for e in p.key_averages() if e.device_time_total>0]
    tot=sum(e.self_device_time_total for e in ev)/4e3
    print(f"GPU busy {tot:.3f} ms/step, launches {sum(e.count for e in ev)/4:.0f}")
    for e in sorted(ev,key=lambda e:-e.self_device_time_total)[:26]:
        print(f"{e.self_device_time_total/4e3:8.4f} ms  x{e.count/4:6.1f}  {e.self_device_time_total/e.count:7.2f} us  {e.key[:110]}")
for side in sys.argv[2].split(","): main(sys.argv[1], side)
