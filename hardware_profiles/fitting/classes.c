/* Counts executed AArch64 instructions by class: a plugin for the user-mode emulator of QEMU 7.2.
 *
 *   gcc -O2 -Wall -fPIC -shared -I FOLDER_OF_HEADER -o libclasses.so classes.c
 *   qemu-aarch64 -plugin libclasses.so,out=counts.jsonl ...
 *
 * The guest marks the end of a region with the system call getpriority(0x4d41524b, tag), which does nothing else.
 * Each mark writes one line {"tag": ..., "all": ..., "fma_f32": ..., ...} and sets all counters to zero.
 *
 * Classes (what they cost depends on the core; a profile has the prices in its [instructions] table):
 *   fma_f32    multiply-add, multiply-subtract of float32, or multiply by an element; scalar fmadd
 *   fma_f16    the same of float16 vectors
 *   fp_other   other floating-point arithmetic on vectors, of two operands on scalars
 *   dot        sdot, udot, usdot, sudot                       mmla  smmla, ummla, usmmla
 *   imul_long  widening multiply(-add): smull, smlal, ...     imul  multiply(-add) of the same width
 *   simd_other all else in the vector and floating-point unit: moves, shuffles, conversions, integer sums
 *   ld_simd, st_simd, ld_int, st_int   loads and stores by kind of register; bytes_ld, bytes_st: their bytes
 *   branch     branches, calls, returns, exceptions, system   int   all else on general registers
 * Prefetches count as loads. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <qemu-plugin.h>

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

enum class {
    ALL, FMA_F32, FMA_F16, FP_OTHER, DOT, MMLA, IMUL_LONG, IMUL, SIMD_OTHER,
    LD_SIMD, ST_SIMD, LD_INT, ST_INT, BRANCH, INT, BYTES_LD, BYTES_ST, CLASSES
};
static const char *const NAMES[CLASSES] = {
    "all", "fma_f32", "fma_f16", "fp_other", "dot", "mmla", "imul_long", "imul", "simd_other",
    "ld_simd", "st_simd", "ld_int", "st_int", "branch", "int", "bytes_ld", "bytes_st"
};
enum { MARK = 0x4d41524b, GETPRIORITY = 141 };

static uint64_t counts[CLASSES];
static FILE *out;

/* Arithmetic on vectors and floats. The first rule whose bits match decides; groups as in the Arm manual. */
static const struct rule { uint32_t mask, bits; enum class class; } RULES[] = {
    /* three registers of the same type */
    {0xbf20fc00, 0x0e20cc00, FMA_F32}, {0x9f20c400, 0x0e20c400, FP_OTHER},
    {0x9f20f400, 0x0e209400, IMUL},    {0x9f200400, 0x0e200400, SIMD_OTHER},
    /* the same, float16 */
    {0xbf60fc00, 0x0e400c00, FMA_F16}, {0x9f60c400, 0x0e400400, FP_OTHER},
    /* the same, later extensions */
    {0x9f20f400, 0x0e009400, DOT},     {0x9f20f400, 0x0e00a400, MMLA},
    {0x9f20f400, 0x0e008400, IMUL},    {0x9f208400, 0x0e008400, FP_OTHER},
    /* registers of different types */
    {0x9f208c00, 0x0e208000, IMUL_LONG}, {0x9f200c00, 0x0e200000, SIMD_OTHER},
    /* vector by element: fmla, fmls, fmul of float16, then of wider floats; dot products; integers */
    {0xbfc0f400, 0x0f001000, FMA_F16}, {0xbfc0f400, 0x0f005000, FMA_F16}, {0x9fc0f400, 0x0f009000, FMA_F16},
    {0xbf00f400, 0x0f001000, FMA_F32}, {0xbf00f400, 0x0f005000, FMA_F32}, {0x9f00f400, 0x0f009000, FMA_F32},
    {0x9f00e400, 0x0f00e000, DOT},     {0x9f002400, 0x0f002000, IMUL_LONG}, {0x9f000400, 0x0f000000, IMUL},
    /* scalars: fmadd and its kin; two operands */
    {0x5f000000, 0x1f000000, FMA_F32}, {0x5f200c00, 0x1e200800, FP_OTHER},
    {0, 0, SIMD_OTHER},
};

static uint32_t field(uint32_t word, int low, int bits) { return (word >> low) & ((1u << bits) - 1); }

/* Class of a load or store, and how many bytes it moves. */
static enum class memory_class(uint32_t word, int *bytes)
{
    int vector = field(word, 26, 1), load, size = field(word, 30, 2), opc = field(word, 22, 2);
    if ((word & 0x3b000000) == 0x18000000) { /* literal */
        load = 1;
        *bytes = vector ? 4 << size : size == 0 ? 4 : 8;
    } else if ((word & 0x3a000000) == 0x28000000) { /* pair */
        load = opc & 1;
        *bytes = vector ? 8 << size : size == 2 ? 16 : 8;
    } else if ((word & 0x3a000000) == 0x38000000) { /* one register */
        load = vector ? opc & 1 : opc != 0;
        *bytes = vector && (opc & 2) ? 16 : 1 << size;
    } else if ((word & 0xbe000000) == 0x0c000000) { /* ld1 .. ld4, st1 .. st4 */
        static const int registers[16] = {[7] = 1, [10] = 2, [8] = 2, [6] = 3, [4] = 3, [2] = 4, [0] = 4};
        int whole = !(word & 0x01000000), n = registers[field(word, 12, 4)];
        load = opc & 1;
        *bytes = whole ? (n ? n : 1) * (field(word, 30, 1) ? 16 : 8) : field(word, 13, 3) >= 6 ? 1 << field(word, 10, 2) : 8;
        vector = 1;
    } else { /* atomic, exclusive */
        load = opc & 1;
        *bytes = 8;
        vector = 0;
    }
    return load ? (vector ? LD_SIMD : LD_INT) : (vector ? ST_SIMD : ST_INT);
}

static enum class class_of(uint32_t word, int *bytes)
{
    uint32_t group = field(word, 25, 4);
    *bytes = 0;
    if ((group & 5) == 4)
        return memory_class(word, bytes);
    if ((group & 0xe) == 0xa)
        return BRANCH;
    if ((group & 7) != 7)
        return INT;
    const struct rule *rule = RULES;
    while ((word & rule->mask) != rule->bits)
        rule++;
    return rule->class;
}

/* Counts a block of instructions once when it is translated, and has the sums added whenever it runs. */
static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    uint64_t sums[CLASSES] = {0};
    size_t n = qemu_plugin_tb_n_insns(block);
    for (size_t i = 0; i < n; i++) {
        uint32_t word;
        int bytes;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        enum class class = class_of(word, &bytes);
        sums[ALL]++;
        sums[class]++;
        sums[class == LD_SIMD || class == LD_INT ? BYTES_LD : BYTES_ST] += bytes;
    }
    for (int i = 0; i < CLASSES; i++)
        if (sums[i])
            qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &counts[i], sums[i]);
}

static void on_syscall(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t which, uint64_t tag,
                       uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    if (number != GETPRIORITY || (uint32_t)which != MARK)
        return;
    fprintf(out, "{\"tag\": %" PRIu64, tag);
    for (int i = 0; i < CLASSES; i++)
        fprintf(out, ", \"%s\": %" PRIu64, NAMES[i], counts[i]);
    fprintf(out, "}\n");
    fflush(out);
    memset(counts, 0, sizeof counts);
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    out = stderr;
    for (int i = 0; i < argc; i++)
        if (!strncmp(argv[i], "out=", 4))
            out = fopen(argv[i] + 4, "a");
    if (!out)
        return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    return 0;
}
