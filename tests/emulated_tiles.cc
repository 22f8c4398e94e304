/* AMX's tile unit in plain C++, as Intel's manual writes its operations: for machines without one. */
#include <cstdint>
#include <cstdlib>
#include <cstring>

static thread_local uint8_t config[64], tiles[8][16][64];

static int rows(int t) { return config[48 + t]; }
static int columns(int t) { return config[16 + 2 * t] + 256 * config[17 + 2 * t]; }

static void check(int holds) {
    if (!holds) abort(); /* #UD */
}

static void check_tile(int t) { check(config[0] == 1 && rows(t) >= 1 && rows(t) <= 16 && columns(t) >= 1 && columns(t) <= 64); }

extern "C" {

void emulated_ldtilecfg(const void *from) {
    memcpy(config, from, 64);
    memset(tiles, 0, sizeof tiles);
    check(config[0] == 1 && config[1] == 0);
    for (int i = 2; i < 16; i++) check(config[i] == 0);
}

void emulated_tilerelease(void) { memset(config, 0, 64); }

void emulated_tilezero(int8_t t) {
    check_tile(t);
    memset(tiles[t], 0, sizeof tiles[t]);
}

void emulated_tileloadd64(int8_t t, const char *from, int64_t stride) {
    check_tile(t);
    memset(tiles[t], 0, sizeof tiles[t]);
    for (int r = 0; r < rows(t); r++) memcpy(tiles[t][r], from + r * stride, columns(t));
}

void emulated_tilestored64(int8_t t, char *to, int64_t stride) {
    check_tile(t);
    for (int r = 0; r < rows(t); r++) memcpy(to + r * stride, tiles[t][r], columns(t));
}

static void check_product(int c, int a, int b) {
    check_tile(a), check_tile(b), check_tile(c);
    check(rows(c) == rows(a) && columns(c) == columns(b) && columns(a) == 4 * rows(b));
}

void emulated_tdpbsud(int8_t c, int8_t a, int8_t b) {
    check_product(c, a, b);
    for (int m = 0; m < rows(c); m++)
        for (int k = 0; k < rows(b); k++)
            for (int n = 0; n < columns(c) / 4; n++) {
                int32_t sum;
                memcpy(&sum, &tiles[c][m][4 * n], 4);
                for (int i = 0; i < 4; i++) sum += (int32_t)(int8_t)tiles[a][m][4 * k + i] * tiles[b][k][4 * n + i];
                memcpy(&tiles[c][m][4 * n], &sum, 4);
            }
}

static float widened(const uint8_t *from) {
    uint32_t bits = (uint32_t)(from[0] + 256 * from[1]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void emulated_tdpbf16ps(int8_t c, int8_t a, int8_t b) {
    check_product(c, a, b);
    for (int m = 0; m < rows(c); m++)
        for (int n = 0; n < columns(c) / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < rows(b); k++) {
                even += widened(&tiles[a][m][4 * k]) * widened(&tiles[b][k][4 * n]);
                odd += widened(&tiles[a][m][4 * k + 2]) * widened(&tiles[b][k][4 * n + 2]);
            }
            memcpy(&sum, &tiles[c][m][4 * n], 4);
            sum += even + odd;
            memcpy(&tiles[c][m][4 * n], &sum, 4);
        }
}

}
