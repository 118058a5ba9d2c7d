"""The report's way, written plainly after its text: what the tests compare with and the benchmark measures against.

Images here are ImageNet-normalised, as the report had them.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class ReferenceGenerator(nn.Module):
    """The report's generator, layer after layer as its table gives them."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale
        self.first, self.first_act = nn.Conv2d(3, 64, 9, padding=4), nn.PReLU()
        self.residual = nn.ModuleList()
        for _ in range(5):
            self.residual.append(nn.ModuleList([
                nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, momentum=0.8), nn.PReLU(),
                nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, momentum=0.8)]))
        self.middle, self.middle_norm = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, momentum=0.8)
        self.up, self.up_act = nn.Conv2d(64, 256, 3, padding=1), nn.PReLU()
        self.last = nn.Conv2d(64, 3, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        start = x = self.first_act(self.first(x))
        for conv1, norm1, act, conv2, norm2 in self.residual:
            x = x + norm2(conv2(act(norm1(conv1(x)))))
        x = start + self.middle_norm(self.middle(x))
        size = 1
        while size < self.scale:  # the same block again and again
            x = self.up_act(nn.functional.pixel_shuffle(self.up(x), 2))
            size *= 2
        return 2.38 * torch.tanh(self.last(x)) + 0.26


class ReferenceDiscriminator(nn.Module):
    """The report's discriminator for squares of `side` px."""

    def __init__(self, side: int):
        super().__init__()
        leaky, layers = nn.LeakyReLU(0.2), []
        layers += [nn.Conv2d(3, 64, 3, 1, 1), leaky]
        layers += [nn.Conv2d(64, 64, 3, 2, 1), nn.BatchNorm2d(64, momentum=0.8), leaky]
        layers += [nn.Conv2d(64, 128, 3, 1, 1), nn.BatchNorm2d(128, momentum=0.8), leaky]
        layers += [nn.Conv2d(128, 128, 3, 2, 1), nn.BatchNorm2d(128, momentum=0.8), leaky]
        layers += [nn.Conv2d(128, 256, 3, 1, 1), nn.BatchNorm2d(256, momentum=0.8), leaky]
        layers += [nn.Conv2d(256, 256, 3, 2, 1), nn.BatchNorm2d(256, momentum=0.8), leaky]
        layers += [nn.Conv2d(256, 512, 3, 1, 1), nn.BatchNorm2d(512), leaky]
        layers += [nn.Conv2d(512, 512, 3, 2, 1), nn.BatchNorm2d(512, momentum=0.8), leaky]
        layers += [nn.Flatten(), nn.Linear(512 * (side // 16) ** 2, 1024), leaky, nn.Linear(1024, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ReferenceFaces(Dataset):
    """(lr, hr) of photos on disk: one PIL image opened, cropped and resized for every item."""

    def __init__(self, paths: list, hr_size: int = 256, scale: int = 4):
        from torchvision import transforms

        self.paths = paths
        normalised = [transforms.ToTensor(), transforms.Normalize(MEAN.flatten(), STD.flatten())]
        bicubic = transforms.InterpolationMode.BICUBIC
        self.to_hr = transforms.Compose([transforms.CenterCrop(144), transforms.Resize(hr_size, bicubic)])
        self.to_lr = transforms.Resize(hr_size // scale, bicubic)
        self.to_tensor = transforms.Compose(normalised)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        hr = self.to_hr(Image.open(self.paths[index]).convert("RGB"))
        return self.to_tensor(self.to_lr(hr)), self.to_tensor(hr)


class ReferenceTraining:
    """Both networks, VGG19's first 19 layers and Adam as a plain reading of the report has them."""

    def __init__(self, scale: int, side: int, vgg: nn.Module, device: torch.device, learning_rate: float = 1e-5):
        self.generator = ReferenceGenerator(scale).to(device)
        self.discriminator = ReferenceDiscriminator(side).to(device)
        self.vgg = vgg.to(device).eval()
        adam = {"lr": learning_rate, "betas": (0.5, 0.999)}
        self.g_adam = torch.optim.Adam(self.generator.parameters(), **adam)
        self.d_adam = torch.optim.Adam(self.discriminator.parameters(), **adam)

    def update(self, lr: Tensor, hr: Tensor) -> dict[str, float]:
        """The discriminator, then the generator, which enlarges the batch a second time for that."""
        fake = self.generator(lr)
        d_loss = 0.5 * ((self.discriminator(hr) - 1) ** 2).mean() + 0.5 * (self.discriminator(fake.detach()) ** 2).mean()
        self.d_adam.zero_grad()
        d_loss.backward()
        self.d_adam.step()

        fake = self.generator(lr)
        content = (self.vgg(fake) - self.vgg(hr).detach()).abs().mean()
        g_loss = content + 1e-3 * 0.5 * ((self.discriminator(fake) - 1) ** 2).mean()
        self.g_adam.zero_grad()
        g_loss.backward()
        self.g_adam.step()
        return {"d_loss": d_loss.item(), "g_loss": g_loss.item(), "content": content.item()}
