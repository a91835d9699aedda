// AMX: eight tiles of up to 16 rows of 64 bytes, and what multiplies them. The instructions are written as assembly,
// since the intrinsics of GCC 12 do not say that they read and write memory. SLOTMOE_PLAIN_TILES gives plain C++ with the
// same bits, for machines without AMX: these six functions are all that differs.
#pragma once
#include <cstdint>
#include <cstring>

namespace slotmoe {
namespace {

#define SLOTMOE_TILE inline __attribute__((always_inline))

constexpr int kTileRows = 16, kTileBytes = 64;  // of a tile, and of a row of it

struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};

    void set(int tile, int rows_of, int bytes_of) { rows[tile] = uint8_t(rows_of), bytes[tile] = uint16_t(bytes_of); }
};

#ifdef SLOTMOE_PLAIN_TILES

struct Tiles {  // not aligned: Windows aligns no thread's own memory to more than 16 bytes
    TileShapes shapes;
    uint8_t tile[8][kTileRows][kTileBytes];
};
inline thread_local Tiles tiles;

inline void tile_shapes(const TileShapes& shapes) { tiles.shapes = shapes, memset(tiles.tile, 0, sizeof tiles.tile); }
inline void tile_release() {}
template <int T>
inline void tile_zero() {
    memset(tiles.tile[T], 0, sizeof tiles.tile[T]);
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
    tile_zero<T>();
    for (int row = 0; row < tiles.shapes.rows[T]; row++)
        memcpy(tiles.tile[T][row], static_cast<const uint8_t*>(p) + row * stride, tiles.shapes.bytes[T]);
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
    for (int row = 0; row < tiles.shapes.rows[T]; row++)
        memcpy(static_cast<uint8_t*>(p) + row * stride, tiles.tile[T][row], tiles.shapes.bytes[T]);
}
// Sums modulo 2^32, as the instructions': C [m, n] += A [m, 4 k] B [k, 4 n].
template <class OfA, class OfB, int C, int A, int B>
inline void tile_dot() {
    constexpr int kWords = kTileBytes / 4;
    const TileShapes& shapes = tiles.shapes;
    const auto(&a)[kTileRows][kTileBytes] = tiles.tile[A], (&b)[kTileRows][kTileBytes] = tiles.tile[B];
    uint32_t sums[kTileRows][kWords];
    memcpy(sums, tiles.tile[C], sizeof sums);
    for (int k = 0; k < shapes.bytes[A] / 4; k++)
        for (int i = 0; i < 4; i++) {
            uint32_t row[kWords];
            for (int n = 0; n < kWords; n++) row[n] = uint32_t(int32_t(OfB(b[k][4 * n + i])));
            for (int m = 0; m < shapes.rows[C]; m++) {
                const uint32_t factor = uint32_t(int32_t(OfA(a[m][4 * k + i])));
                for (int n = 0; n < kWords; n++) sums[m][n] += factor * row[n];
            }
        }
    memcpy(tiles.tile[C], sums, sizeof sums);
}

#else

inline void tile_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
// After each call: threads that hold tiles are slow to switch.
inline void tile_release() { asm volatile("tilerelease" : : : "memory"); }
template <int T>
SLOTMOE_TILE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
SLOTMOE_TILE void tile_load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
SLOTMOE_TILE void tile_store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
// C [m, n] += A [m, 4 k] B [k, 4 n], of bytes of these types.
template <class OfA, class OfB, int C, int A, int B>
SLOTMOE_TILE void tile_dot() {
    constexpr bool kSignedA = OfA(-1) < 0, kSignedB = OfB(-1) < 0;
    if (kSignedA && kSignedB)
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    else if (kSignedA)
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    else
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace slotmoe
