"""Which files nn-Meter's four published predictors consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

_RELEASE = "https://github.com/microsoft/nn-Meter/releases/download/v1.0-data"


@final
@dataclass(frozen=True)
class OfficialFile:
    """A pickled forest, as a Git LFS pointer of github.com/microsoft/nn-Meter names it."""

    sha256: str
    size: int


@final
@dataclass(frozen=True)
class OfficialPredictor:
    """One of nn-Meter's predictors.

    Attributes:
        unpacked_bytes: about; of the files whose size is known.
        files: by kernel; of some no pointer is kept.
    """

    name: str
    files: Mapping[str, OfficialFile]

    @property
    def url(self) -> str:
        return f"{_RELEASE}/{self.name}.zip"

    @property
    def unpacked_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def _predictor(name: str, **files: tuple[str, int]) -> OfficialPredictor:
    named = {kernel.replace("_", "-"): OfficialFile(*facts) for kernel, facts in files.items()}
    return OfficialPredictor(name, named)


# From the pointers under data/predictorzoo, commits 70f238b and 05560a7; the folders cpu, gpu, gpu1 and vpu
# of the second are the four devices under their earlier names. The sums are the 1.1 to 2.8 GB that are known.
OFFICIAL: Mapping[str, OfficialPredictor] = {
    predictor.name: predictor
    for predictor in (
        _predictor(
            "cortexA76cpu_tflite21",
            add=("1067c9400180313748f353ca1fa5b9d7488f419e1096c6bec27dbc8c8abbe292", 31757462),
            avgpool=("59fb459c230fc4a06f560af9dbb3a0cfbfdc365240c435a521f2343235ab026a", 77011080),
            bn=("9941c29efd93674847c6acaba353976e3d86fcb800e34bb069ab6864ff24517d", 30081902),
            channelshuffle=("ef634795f0cc80d68ae505c0e104582323029603b4fb742619dfd15d7da06681", 14827163),
            concat=("8d78c947ef08e3ae0b32faa766ef6fea5c1a310ba5a661ea38d2259341fd669c", 335113694),
            conv_bn_relu=("32e1772324dd1f35a58109578c0872311de5a4c45121c86bc2f00ee7777a54b4", 525120135),
            dwconv_bn_relu=("41d417105dfde7921e001a5724c585ea9d1b1e7ab8d5efc95834b6ad8dcbfcf2", 82660737),
            fc=("27944bfe2496c81301c28c5cfada23b159eb2688e734edfa114841b9510cf3b5", 58072608),
            global_avgpool=("fb3e9873ff3d21bf9b536c751712a2d20ee18c3fcb6af6138f40ffcbca218d64", 28156904),
            hswish=("68110b0301d909379a399d9d7705f64e3726554871ff675a06789a6744c937c9", 24177043),
            maxpool=("31e45222c6bf6acbe8c9f3d09a76e3e4309a7584762f85b39f61caffd95367b0", 10680143),
            relu=("1abef7db983667aedde9b1ba84f1f2ea7296411f95916a8be3a278e336a76a27", 31535606),
            se=("66a3fb240d141ce56847dcdd90e7e07ea1fff7f1ad61bfd98e9a538018e8c9a4", 60680510),
            split=("70a07b915219c4fa1d0630630e28d21e01771b3360f611a3ec2ee463a171ae0e", 29598568),
        ),
        _predictor(
            "adreno640gpu_tflite21",
            avgpool=("d1b2033263496b2e281f15d4ceec8262322243f11ba2e12cb23646200b042024", 45715136),
            bn=("aff19249f20779082c253bdc7530b108fb538699d50834a92629143e0f1d4d41", 15444833),
            bnrelu=("b38e4e818283ab35911dc5b604e9d25e013c4d383efccf9535498a1395472a16", 21423235),
            concat=("f61796e9b58e7cf768c7c21ad113c6d9937bfed4f0b22f06042b9f695786daa0", 314337208),
            conv_bn_relu=("6a8ab34a9ce86a05cacb8a2bef5262c282446e42d83a105786907d4bf78b514c", 511452207),
            dwconv_bn_relu=("caf3e7f9e74cbde55a54bbc6677e9a9049379e1106d8996ccb35b295ba7d7e92", 104804833),
            hswish=("ca2b8f75ccbe0d94e474d67571577fda6e709ef0c1d2ac826e8b443b921635d2", 24158227),
            maxpool=("389908c2fb06bc73c167d4f3532de85fbf4e443b487d9fa51d4ab205480c0061", 41027928),
            relu=("4681fb580afce153c3cb4ab44b478a3edb0c2660868c4c07b5082c3436bdb312", 16206313),
            se=("d522f27d4913d00c2f380036a3bdc6f13d827338c044dd5fcc11deb873f0c119", 31725923),
        ),
        _predictor(
            "adreno630gpu_tflite21",
            avgpool=("5527126c2759a657d0d10454ea8273bacc205fea134b8ceaa6c5fc71b4ce312f", 77156238),
            bn=("3531cd88be80305311b4d69ea15a66a6996b1eef4e95d7d5e0451c03b1d0a95b", 9131033),
            bnrelu=("33df3e0d2fdf90ccf964b6a8765a04e6b26dae60740f6420c87e034c04cb982e", 21429257),
            concat=("754e1982ad85e83e6675bb9e42fbbb1a9085ccfec7b984bfead70930f04d54ae", 239611118),
            conv_bn_relu=("b3afc2260aeb50be8cb77c789db54e47c35d3f1d892ef57f9a210314c3954bb7", 887325963),
            dwconv_bn_relu=("b06298282f0d2d615b66e6e29072c2d98c512f659f19b2ad1f3e097f12eb3600", 105227087),
            hswish=("d42de5da113039b259321135d52a5e986e74ba8045d60b3525dc37a1644a51cf", 24171161),
            maxpool=("a0e024cba85b204c396f81eab90dcc8433b6af9916b5c4026b5f7e637013583c", 41016542),
            relu=("119799b3bf4261ffca7b03df81555b09f750431057b2bbbf6ec31605bbc4e61a", 8908577),
            se=("1400f74cc03ec869899a33febe2fee59e67284161a68ad6fd8faf8f46dd7c937", 31737193),
        ),
        _predictor(
            "myriadvpu_openvino2019r2",
            addrelu=("b1e542652b0c5346a292b4c9001344c393790823aaf36d36f6f4483f3838157f", 97809942),
            avgpool=("afdd70747cacdba5b22e1b9767b0cad884d4e985cef02069bdf418b865d32ca7", 62456050),
            bn=("1cc90ea1ff6911fa14cf4f5b1d7d6873fb30d7612df0b9f835e86ae35fe00874", 45004118),
            bnrelu=("6ee8070a8dc233c05f98d0a31a372faede249cff06c428204741998a93d73e2a", 137672654),
            channelshuffle=("23533ae012ba9bdee6e7f8b887d73139da44c8b4523fb669412d47a9a21908cf", 24711670),
            conv_bn_relu=("cc1842af66de0836227338ab4a4eb4a43463e54ca63ba7e7c4d48ba477657019", 1782808705),
            dwconv_bn_relu=("11e186446b100dd870e8080a6dd47d2b7b9e76bfc08e743c03a5c810742ec303", 383903295),
            fc=("cba605a674fe458ca72a50794750fb94e8bf2954f740d68f5518b954cff8a619", 176341951),
            hswish=("cf4e20f00ac909787a4708d578fffeb22e8031935d1d04fa133f2734dc68c926", 17524833),
            maxpool=("0dfcbeaf376799682c5d77ef03615eee4f38f611650124c5471908996497b196", 34594350),
            relu=("38fe8c1594bfdfee116d40d1a9d245b789756b55da4f97494e927a1bbb83e13f", 41474630),
            se=("e2762070209f67da72a59446d60ab5c824d0a687de27ae6a4222ca69703c6913", 23321401),
        ),
    )
}
