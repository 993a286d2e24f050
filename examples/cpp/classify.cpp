// Classifies pictures with a package of `vmamba export --format aoti --embed true`, without Python:
//     classify model.pt2 PICTURE.ppm ...        (convert photo.jpg -resize 224x224! photo.ppm)
// Pictures are binary, of 8 bits: PPM (P6) for a model of colour pictures, PGM (P5) for one of grey pictures.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>

at::Tensor read(const std::string& name) {  // (1, C, H, W), uint8
    std::ifstream file(name, std::ios::binary);
    std::string magic;
    int64_t width = 0, height = 0, largest = 0;
    file >> magic >> width >> height >> largest;
    std::string pixels(std::istreambuf_iterator<char>(file.ignore()), {});
    int64_t channels = magic == "P6" ? 3 : magic == "P5" ? 1 : 0;
    if (!channels || largest != 255 || width < 1 || height < 1 || pixels.size() / channels / width < size_t(height))
        throw std::runtime_error("this is no binary PPM or PGM of 8 bits");
    at::Tensor picture = at::from_blob(pixels.data(), {1, height, width, channels}, at::kByte);
    return picture.permute({0, 3, 1, 2}).clone(at::MemoryFormat::Contiguous);  // beyond this function's pixels
}

int main(int count, char** names) {
    if (count < 2) {
        std::cerr << "usage: classify model.pt2 PICTURE.ppm ...\n";
        return 2;
    }
    std::string name = names[1];  // what is being read, for the message
    try {
        torch::inductor::AOTIModelPackageLoader model(name);
        std::cout << "classes: " << model.get_metadata()["class_names"] << std::endl;
        for (int i = 2; i < count; i++) {
            name = names[i];
            auto results = model.run({read(name)});  // labels (1,) and probabilities (1, classes)
            std::cout << name << ": " << results[0].item<int64_t>() << " " << results[1].max().item<float>() << "\n";
        }
    } catch (const std::exception& error) {
        std::cerr << name << ": " << error.what() << "\n";
        return 1;
    }
}
