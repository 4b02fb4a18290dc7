// Decodes a box of a JPEG with the libjpeg-turbo that Pillow has loaded. jpeg_region.py builds and calls this file.
//
// The entropy-coded data have to be read up to the last row of the box, but the inverse DCT, the upsampling and the
// colour conversion are skipped outside the box. The functions are looked up at run time; jpeglib.h only declares them,
// and the library refuses a caller that was compiled for another ABI.
#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <type_traits>

// The ABI is that of Pillow's library (LAYOUT), not that of the copy installed on this machine.
#define JCONFIG_INCLUDED
#include <jconfig.h>
#undef JPEG_LIB_VERSION
#define JPEG_LIB_VERSION LAYOUT
#ifndef MEM_SRCDST_SUPPORTED
#define MEM_SRCDST_SUPPORTED
#endif
#include <jpeglib.h>

namespace {

struct Library {
    decltype(&jpeg_std_error) std_error;
    decltype(&jpeg_CreateDecompress) create;
    decltype(&jpeg_destroy_decompress) destroy;
    decltype(&jpeg_mem_src) read_from;
    decltype(&jpeg_read_header) read_header;
    decltype(&jpeg_start_decompress) start;
    decltype(&jpeg_crop_scanline) crop;
    decltype(&jpeg_skip_scanlines) skip;
    decltype(&jpeg_read_scanlines) read;
} jpeg;

struct Box {
    int64_t x0, y0, x1, y1;
};

struct Decoder {
    jpeg_error_mgr errors;  // first, as the library passes a pointer to it
    jmp_buf failed;
    jpeg_decompress_struct info;
};

void fail(j_common_ptr info) { std::longjmp(reinterpret_cast<Decoder*>(info->err)->failed, 1); }
void say_nothing(j_common_ptr) {}

// Returns whether the first marker in the data of a scan is the end of the image. Damage below the box makes decoding
// the whole image fail, so it must fail here too, whatever the box. Only damage that shows in a marker is detected.
bool ends_well(const uint8_t* p, const uint8_t* end) {
    constexpr uint8_t mark = 0xff, stuffing = 0x00, restart = 0xd0, end_of_image = 0xd9;
    while ((p = static_cast<const uint8_t*>(std::memchr(p, mark, end - p))) && ++p < end)
        if (*p != stuffing && (*p & 0xf8) != restart) return *p == end_of_image;
    return false;
}

// Returns whether the image is grey or has one of the common samplings: the chroma components have the resolution of
// the first component, or half of it in one or both directions. Some versions of the library decode boxes of other
// samplings, which are rare, incorrectly.
bool is_common(const jpeg_decompress_struct& info) {
    const int across = info.max_h_samp_factor, down = info.max_v_samp_factor;
    if (across > 2 || down > 2) return false;
    if (info.num_components == 1) return across == 1 && down == 1;
    for (int i = 0; i < info.num_components; ++i) {
        const jpeg_component_info& colour = info.comp_info[i];
        const bool fine = colour.h_samp_factor == across && colour.v_samp_factor == down;
        if (!fine && (i == 0 || colour.h_samp_factor != 1 || colour.v_samp_factor != 1)) return false;
    }
    return true;
}

// An error in the library jumps out of this function, so its objects must not need destructors.
bool decode(Decoder& decoder, const uint8_t* data, int64_t size, uint8_t* pixels, int64_t width, int64_t height,
            Box box) {
    jpeg_decompress_struct& info = decoder.info;
    info.err = jpeg.std_error(&decoder.errors);
    info.err->error_exit = fail;
    info.err->output_message = say_nothing;
    if (setjmp(decoder.failed)) return false;
    jpeg.create(&info, JPEG_LIB_VERSION, sizeof info);
    jpeg.read_from(&info, data, size);
    jpeg.read_header(&info, TRUE);
    info.out_color_space = JCS_EXT_RGBX;
    jpeg.start(&info);
    if (info.output_width != width || info.output_height != height) return false;

    if (!is_common(info)) box = {0, 0, width, height};
    // Upsampling subsampled chroma needs neighbouring columns, so one more block is decoded on either side. Above and
    // below the box the library takes care of it.
    const int64_t block = 8 * info.max_h_samp_factor, beside = block > 8 ? block : 0;
    box.x0 = std::max<int64_t>(box.x0 / block * block - beside, 0);
    box.x1 = std::min((box.x1 + block - 1) / block * block + beside, width);
    if (box.x0 > 0 || box.x1 < width) {
        JDIMENSION begin = JDIMENSION(box.x0), columns = JDIMENSION(box.x1 - box.x0);
        jpeg.crop(&info, &begin, &columns);
        if (begin != box.x0 || columns != box.x1 - box.x0) return false;
    }
    if (box.y0 > 0 && jpeg.skip(&info, JDIMENSION(box.y0)) != box.y0) return false;
    while (info.output_scanline < box.y1) {
        JSAMPROW row = pixels + 4 * (info.output_scanline * width + box.x0);
        jpeg.read(&info, &row, 1);
    }
    return info.err->num_warnings == 0;
}

}  // namespace

// Looks up the functions in a loaded library. Returns the name of a missing one, or null.
extern "C" const char* bind(void* library) {
    const char* missing = nullptr;
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        if (!function) missing = name;
    };
    find(jpeg.std_error, "jpeg_std_error");
    find(jpeg.create, "jpeg_CreateDecompress");
    find(jpeg.destroy, "jpeg_destroy_decompress");
    find(jpeg.read_from, "jpeg_mem_src");
    find(jpeg.read_header, "jpeg_read_header");
    find(jpeg.start, "jpeg_start_decompress");
    find(jpeg.crop, "jpeg_crop_scanline");
    find(jpeg.skip, "jpeg_skip_scanlines");
    find(jpeg.read, "jpeg_read_scanlines");
    return missing;
}

// Decodes a file of `size` bytes into `pixels`, RGBX [height, width]; only box x0, y0, x1, y1 is valid afterwards.
// `scan` is the position of its only scan, or -1. Returns 0 after an error or a warning.
extern "C" int64_t decode_region(const uint8_t* data, int64_t size, int64_t scan, uint8_t* pixels, int64_t width,
                                 int64_t height, int64_t x0, int64_t y0, int64_t x1, int64_t y1) {
    if (scan >= 0 && !ends_well(data + scan + 2, data + size)) return 0;
    Decoder decoder{};
    const bool done = decode(decoder, data, size, pixels, width, height, {x0, y0, x1, y1});
    jpeg.destroy(&decoder.info);
    return done;
}
