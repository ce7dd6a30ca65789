/* Hide AVX-512, VNNI and AMX from the programs of this processor, to time it as one that has AVX2 alone.

       gcc -O2 -shared -fPIC -o without_vnni.so bench/without_vnni.c
       LD_PRELOAD=$PWD/without_vnni.so python bench/peers.py ...

   Linux can make the instruction CPUID fault (arch_prctl(2), ARCH_SET_CPUID; /proc/cpuinfo shows cpuid_fault). The
   handler executes it and clears the bits of what is hidden, so libraries choose their AVX2 kernels, which run at full
   speed. What a compiler has built for a processor (-march=native) asks nobody and is not affected. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define SET_CPUID 0x1012 /* ARCH_SET_CPUID of <asm/prctl.h>; 0: CPUID faults */
#define BIT(n) (1u << (n))
/* Leaf 7, subleaf 0: AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; 4VNNIW, 4FMAPS,
   VP2INTERSECT, AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8. */
#define HIDDEN_EBX (BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31))
#define HIDDEN_ECX (BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14))
#define HIDDEN_EDX (BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25))
/* Leaf 7, subleaf 1: AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX,
   AVX-VNNI-INT16, AVX10. */
#define HIDDEN_EAX_1 (BIT(4) | BIT(5) | BIT(21) | BIT(23))
#define HIDDEN_EDX_1 (BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19))

static struct sigaction before;

static void answer(int signal, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)r[REG_RIP];
    /* A general protection fault has no address; any other segmentation fault is not ours. */
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        sigaction(signal, &before, NULL);
        return;
    }
    unsigned leaf = r[REG_RAX], subleaf = r[REG_RCX], a, b, c, d;
    syscall(SYS_arch_prctl, SET_CPUID, 1);
    __cpuid_count(leaf, subleaf, a, b, c, d);
    syscall(SYS_arch_prctl, SET_CPUID, 0);
    if (leaf == 7 && subleaf == 0)
        b &= ~HIDDEN_EBX, c &= ~HIDDEN_ECX, d &= ~HIDDEN_EDX;
    if (leaf == 7 && subleaf == 1)
        a &= ~HIDDEN_EAX_1, d &= ~HIDDEN_EDX_1;
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
    struct sigaction ours = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (sigaction(SIGSEGV, &ours, &before) || syscall(SYS_arch_prctl, SET_CPUID, 0)) {
        fputs("without_vnni: this kernel or processor cannot make CPUID fault\n", stderr);
        exit(3);
    }
}
