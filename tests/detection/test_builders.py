"""Feature pyramids on any backbone, and torchvision's detectors on them."""
import copy

import pytest
import timm
import torch
from common import IS_OLD_TIMM, has_batch_norm, randomize_, relative_error
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import smpconv_models
from smpconv_models import detection
from smpconv_models.training import param_groups

DETECTORS = ('fasterrcnn', 'maskrcnn', 'retinanet', 'fcos')


def pyramid(backbone='smpconv_nano', **kwargs):
    return detection.fpn_backbone(backbone, **{'out_channels': 32, **kwargs})


def detector(name, **kwargs):
    few = {'box_batch_size_per_image': 16, 'rpn_post_nms_top_n_train': 50, 'rpn_post_nms_top_n_test': 20}
    return getattr(detection, name)(
        pyramid(**kwargs), num_classes=4, min_size=64, max_size=96, **(few if name.endswith('rcnn') else {}))


def images_and_targets():
    torch.manual_seed(0)
    boxes = torch.tensor([[4., 6, 30, 40], [20, 10, 60, 50]])
    masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    targets = [{'boxes': boxes, 'labels': torch.tensor([1, 3]), 'masks': masks},
               {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.long), 'masks': masks[:0, :48, :48]}]
    return [torch.rand(3, 64, 80), torch.rand(3, 48, 48)], targets


def losses_of(model):
    return model.train()(*images_and_targets())


def feature_parameters(model, end):
    return {name: param for name, param in model.backbone.body.named_parameters() if name.endswith(end)}


# --- the detectors ---


@pytest.mark.parametrize('name', DETECTORS)
def test_a_step_reaches_the_points_and_leaves_radii_in_their_range(name):
    torch.manual_seed(0)
    model = detector(name, returned_layers=(2, 3, 4))
    losses = losses_of(model)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for end in ('.coords', '.radius', 'stem_0.conv.weight'):
        found = feature_parameters(model, end)
        assert found and all(param.grad.abs().sum() > 0 for param in found.values())
    groups = param_groups(model, weight_decay=0.05)
    assert {id(param) for group in groups if group['lr_scale'] == 0.1 for param in group['params']} \
        == {id(param) for param in feature_parameters(model, '.radius').values()}
    torch.optim.SGD(groups, lr=1e3).step()
    smpconv_models.clip_radius_(model)
    assert all(param.min() > 0 and param.max() <= 1 for param in feature_parameters(model, '.radius').values())


@pytest.mark.parametrize('name', DETECTORS)
def test_detections_are_of_the_classes_and_within_the_images(name):
    thresholds = {'score_thresh': 0., 'detections_per_img': 5}
    if name.endswith('rcnn'):
        thresholds = {f'box_{key}': value for key, value in thresholds.items()}
    model = getattr(detection, name)(pyramid(), num_classes=4, min_size=64, max_size=96, **thresholds).eval()
    images, _ = images_and_targets()
    with torch.no_grad():
        found = model(images)
    for image, boxes in zip(images, found):
        height, width = image.shape[1:]
        assert len(boxes['boxes']) and boxes['labels'].max() < 4
        assert boxes['boxes'].min() >= 0
        assert boxes['boxes'][:, 2].max() <= width and boxes['boxes'][:, 3].max() <= height
        if name == 'maskrcnn':
            assert boxes['masks'].shape[1:] == (1, height, width)


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize(('layers', 'extra'), [((1, 2, 3, 4), None), ((2, 3), None), ((3, 4), LastLevelP6P7(32, 32))])
def test_levels_strides_and_anchors_agree(name, layers, extra):
    model = detector(name, returned_layers=layers, extra_blocks=extra)
    image = torch.rand(1, 3, 128, 64)
    levels = list(model.backbone(image).values())
    strides = model.backbone.strides
    stage_strides = [2 ** layer for layer in layers]
    last = stage_strides[-1]
    assert strides == stage_strides + ([2 * last] if extra is None else [2 * last, 4 * last])
    assert model.backbone.num_maps == len(layers)
    assert [level.shape for level in levels] == [(1, 32, 128 // stride, 64 // stride) for stride in strides]
    anchors = (model.rpn if name.endswith('rcnn') else model).anchor_generator
    assert len(anchors.sizes) == len(anchors.aspect_ratios) == len(strides)
    scale = {'fcos': 1, 'retinanet': 4}.get(name, 8)
    assert [size[0] for size in anchors.sizes] == [scale * stride for stride in strides]
    if name.endswith('rcnn'):
        pools = [model.roi_heads.box_roi_pool] + [model.roi_heads.mask_roi_pool] * (name == 'maskrcnn')
        assert all(pool.featmap_names == [str(index) for index in range(len(layers))] for pool in pools)


def test_at_stride_4_to_32_the_anchors_are_torchvisions():
    with torch.device('meta'):
        model = detection.fasterrcnn(detection.fpn_backbone('smpconv_t'))
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.roi_heads.box_predictor.cls_score.out_features == 91
    retina = detection.retinanet(
        detection.fpn_backbone('smpconv_mobile31', returned_layers=(2, 3, 4), extra_blocks=LastLevelP6P7(256, 256)))
    assert retina.backbone.strides == [8, 16, 32, 64, 128]
    assert retina.anchor_generator.sizes[0] == (32, 40, 50)
    assert retina.anchor_generator.sizes[-1] == (512, 645, 812)


def test_arguments_override_the_defaults():
    model = detection.fcos(pyramid(in_chans=4), 4, image_mean=[0.1] * 4, image_std=[1.] * 4, score_thresh=0.4)
    assert model.transform.image_mean == [0.1] * 4 and model.transform.image_std == [1.] * 4
    assert model.score_thresh == 0.4
    predictor = nn.Identity()
    assert detection.fasterrcnn(pyramid(), None, box_predictor=predictor).roi_heads.box_predictor is predictor
    with pytest.raises(ValueError, match='num_classes should be None'):
        detection.fasterrcnn(pyramid(), 4, box_predictor=predictor)


@pytest.mark.parametrize('name', DETECTORS)
def test_unknown_arguments_are_refused(name):
    for wrong in ('min_sise', 'kwargs'):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            getattr(detection, name)(pyramid(), 4, **{wrong: 64})
    assert getattr(detection, name)(pyramid(), 4, fixed_size=(64, 96)).transform.fixed_size == (64, 96)


# --- freezing ---


@pytest.mark.parametrize('name', DETECTORS)
def test_frozen_parameters_get_no_gradient(name):
    model = detector(name, trainable_layers=0, frozen_bn=True)
    sum(losses_of(model).values()).backward()
    assert not any(param.requires_grad or param.grad is not None for param in model.backbone.body.parameters())
    assert all(param.grad is not None for param in model.backbone.fpn.parameters())


@pytest.mark.parametrize(('count', 'trained'), [
    (1, ['stages_3']), (3, ['stages_1', 'stages_2', 'stages_3']),
    (5, ['stages_0', 'stages_1', 'stages_2', 'stages_3', 'stem_0', 'stem_1', 'stem_2', 'stem_3']),
])
def test_the_last_layers_are_trained(count, trained):
    body = pyramid(trainable_layers=count).body
    found = {name.split('.')[0]: param.requires_grad for name, param in body.named_parameters()}
    assert sorted(name for name, requires_grad in found.items() if requires_grad) == trained
    assert len(found) == 8


@pytest.mark.parametrize(('name', 'stem'), [
    ('test_resnet', ['conv1', 'bn1']), ('test_convnext', ['stem_0', 'stem_1']),
    ('test_efficientnet', ['conv_stem', 'bn1'])])
def test_layers_of_other_networks(name, stem):
    body = pyramid(name).body
    count = len(detection._layers(body)[0])
    body = pyramid(name, trainable_layers=count - 1).body
    assert {key.split('.')[0] for key, param in body.named_parameters() if not param.requires_grad} == set(stem)
    layers, unused = detection._layers(body)
    assert sum(map(len, layers)) + len(unused) == len(list(body.parameters()))


def test_unused_stages_are_not_layers():
    body = pyramid('test_efficientnet', returned_layers=(1, 2), trainable_layers=1).body
    assert hasattr(body.blocks, '4')  # timm leaves it there
    assert not any(param.requires_grad for param in body.blocks[0].parameters())
    assert all(param.requires_grad for param in body.blocks[1].parameters())
    assert not any(param.requires_grad for param in body.blocks[4].parameters())  # or ranks would wait
    with pytest.raises(ValueError, match=r'must lie in \[0, 3\]'):
        pyramid('test_efficientnet', returned_layers=(1, 2), trainable_layers=4)


def test_frozen_batch_norms_stay_in_training():
    randomized = randomize_(timm.create_model('smpconv_nano', features_only=True))
    model = detection.fcos(pyramid(copy.deepcopy(randomized), frozen_bn=True), 4, min_size=64, max_size=96)
    body = model.backbone.body
    assert not has_batch_norm(body)
    frozen = [module for module in body.modules() if isinstance(module, FrozenBatchNorm2d)]
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in frozen]
    losses = losses_of(model)
    sum(losses.values()).backward()
    torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1).step()
    assert len(frozen) == sum(isinstance(module, nn.BatchNorm2d) for module in randomized.modules())
    for module, state in zip(frozen, before):
        assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())


def test_frozen_and_evaluated_are_the_same():
    randomized = randomize_(timm.create_model('smpconv_nano', features_only=True))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = copy.deepcopy(randomized).eval()(image)
        got = pyramid(randomized, frozen_bn=True).train().body(image)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, expected))


def test_batch_norms_not_frozen_learn_their_statistics():
    model = detector('fcos')
    before = model.backbone.body.stages_3.blocks[0].mixer.norm.running_mean.clone()
    losses_of(model)
    assert not torch.equal(model.backbone.body.stages_3.blocks[0].mixer.norm.running_mean, before)


@pytest.mark.parametrize('frozen_bn', [True, False])
def test_reparameterization_keeps_the_pyramid(frozen_bn):
    model = detection.fcos(
        pyramid(randomize_(timm.create_model('smpconv_nano', features_only=True)), frozen_bn=frozen_bn), 4).eval()
    fast = timm.utils.reparameterize_model(model)
    assert not any(isinstance(module, (smpconv_models.SMPDepthwiseConv2d, nn.BatchNorm2d, FrozenBatchNorm2d))
                   for module in fast.backbone.modules())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, got = model.backbone(image), fast.backbone(image)
    assert list(got) == list(expected)
    assert all(relative_error(got[name], expected[name]) < 1e-4 for name in got)


# --- memory ---


def test_gradient_checkpointing_keeps_the_gradients():
    torch.manual_seed(0)
    kept = pyramid(randomize_(timm.create_model('smpconv_nano', features_only=True)))
    again = copy.deepcopy(kept)
    again.set_grad_checkpointing()
    image = torch.rand(2, 3, 64, 64)
    calls = []
    again.body.stages_1.register_forward_pre_hook(lambda *_: calls.append(1))
    for backbone in (kept, again):
        sum(level.square().mean() for level in backbone.train()(image).values()).backward()
    assert len(calls) == 2
    for expected, got in zip(kept.parameters(), again.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)
    again.set_grad_checkpointing(False)
    sum(level.mean() for level in again(image).values()).backward()
    assert len(calls) == 3


def test_unsupported_gradient_checkpointing_is_refused():
    body = timm.create_model('smpconv_nano', features_only=True, feature_cls='getter')
    with pytest.raises(ValueError, match='FeatureGetterNet has no gradient checkpointing'):
        pyramid(body).set_grad_checkpointing()


# --- pretrained weights, other networks ---


def test_pretrained_weights_come_before_freezing(tmp_path):
    source = randomize_(timm.create_model('smpconv_nano', num_classes=7))
    save_file(source.state_dict(), tmp_path / 'weights.safetensors')
    overlay = dict(file=str(tmp_path / 'weights.safetensors'), num_classes=7)
    backbone = pyramid(pretrained=True, pretrained_cfg_overlay=overlay)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.eval().forward_intermediates(image, intermediates_only=True)
        got = backbone.train().body(image)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, expected))
    trained = {name.split('.')[0] for name, param in backbone.body.named_parameters() if param.requires_grad}
    assert trained == {'stages_1', 'stages_2', 'stages_3'}
    assert has_batch_norm(pyramid(pretrained=True, pretrained_cfg_overlay=overlay, frozen_bn=False).body)


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_efficientnet'])
def test_other_networks_of_timm(name):
    model = detection.fasterrcnn(
        pyramid(name, frozen_bn=True), 4, min_size=64, max_size=96, box_batch_size_per_image=16)
    assert model.backbone.strides == [4, 8, 16, 32, 64]
    losses = losses_of(model)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(param.grad is not None for param in model.backbone.parameters())


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize(('backbone', 'in_chans'), [
    ('smpconv_nano', 3), ('test_convnext', 3), ('smpconv_nano', 1), ('smpconv_nano', 4)])
def test_images_are_normalized_as_the_network_was_trained(name, backbone, in_chans):
    model, cfg = detector(name, backbone=backbone, in_chans=in_chans), timm.get_pretrained_cfg(backbone)
    for got, expected in (model.transform.image_mean, cfg.mean), (model.transform.image_std, cfg.std):
        assert got == (list(expected) if in_chans == 3 else [sum(expected) / 3] * in_chans)
    if in_chans != 3:
        images, targets = images_and_targets()
        images = [image.mean(0, keepdim=True).expand(in_chans, -1, -1) for image in images]
        assert all(loss.isfinite() for loss in model.train()(images, targets).values())


@pytest.mark.parametrize('in_chans', [1, 4])
@pytest.mark.parametrize('backbone', [
    'test_resnet', 'tresnet_m',
    lambda in_chans: timm.create_model('smpconv_nano', features_only=True, in_chans=in_chans),
], ids=['by name', 'whose first convolution has other channels', 'created'])
def test_channels_of_any_network(backbone, in_chans):
    if isinstance(backbone, str):
        made = pyramid(backbone, in_chans=in_chans)
    elif IS_OLD_TIMM:
        pytest.skip('features of timm before 1.0.31 do not keep their number of input channels')
    else:
        made = pyramid(backbone(in_chans))
    transform = detection.fcos(made, 4).transform
    assert len(transform.image_mean) == len(transform.image_std) == in_chans


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
def test_a_created_network_defines_the_levels(feature_cls):
    body = timm.create_model('smpconv_nano', features_only=True, out_indices=(1, 3), feature_cls=feature_cls)
    backbone = pyramid(body, trainable_layers=1)
    assert backbone.strides == [4, 16, 32]
    assert [level.shape[-1] for level in backbone(torch.rand(1, 3, 64, 64)).values()] == [16, 4, 2]
    trained = [name for name, param in backbone.body.named_parameters() if param.requires_grad]
    assert trained and all('stages_3.' in name or 'stages.3.' in name for name in trained)


def test_the_last_four_maps_by_default():
    assert pyramid().strides == [2, 4, 8, 16, 32]
    assert pyramid('test_resnet').strides == [4, 8, 16, 32, 64]  # timm's begin at stride 2


def test_finding_the_strides_does_not_change_the_norms():
    fpn = pyramid(fpn_norm_layer=nn.BatchNorm2d).fpn
    norms = [module for module in fpn.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.num_batches_tracked == 0 for norm in norms)


# --- bad input ---


@pytest.mark.parametrize(('kwargs', 'message'), [
    ({'backbone': 'smpconv_x'}, "timm's name of a network, .*got 'smpconv_x'"),
    ({'backbone': nn.Conv2d(3, 3, 1)}, 'features_only=True, got Conv2d'),
    ({'backbone': None}, 'features_only=True, got NoneType'),
    ({'returned_layers': (4, 5)}, r'smpconv_nano lacks a stage of returned_layers=\(4, 5\).*got \(3, 4\)'),
    ({'backbone': 'test_resnet', 'returned_layers': (2, 6)}, r'test_resnet lacks a map of returned_layers=\(2, 6\)'),
    ({'returned_layers': (0, 1)}, r'stages counted from 1, ascending, got \(0, 1\)'),
    ({'returned_layers': (3, 2)}, r'ascending, got \(3, 2\)'),
    ({'returned_layers': (2, 2)}, r'ascending, got \(2, 2\)'),
    ({'returned_layers': ()}, r'ascending, got \(\)'),
    ({'trainable_layers': 6}, r'must lie in \[0, 5\].*got 6'),
    ({'trainable_layers': -1}, r'must lie in \[0, 5\].*got -1'),
    ({'returned_layers': (1, 2), 'trainable_layers': 4}, r'must lie in \[0, 3\].*got 4'),
    ({'out_channels': 0}, 'out_channels must be at least 1, got 0'),
    ({'extra_blocks': LastLevelP6P7(256, 256)}, r'extra_blocks do not fit the maps of \[24, 48, 72, 96\] channels'),
    ({'features_only': True}, 'features_only cannot be given for smpconv_nano'),
    ({'out_indices': (1, 2)}, 'out_indices cannot be given for smpconv_nano'),
    ({'backbone': 'swin_s3_tiny_224', 'img_size': 64}, 'must be NCHW, got NHWC'),
])
def test_invalid_pyramids_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pyramid(**kwargs)


@pytest.mark.parametrize('kwargs', [{'pretrained': True}, {'returned_layers': (1, 2)}, {'drop_path_rate': 0.1}])
def test_a_created_network_takes_no_arguments_for_its_creation(kwargs):
    with pytest.raises(ValueError, match='need a backbone given by name, got a FeatureListNet'):
        pyramid(timm.create_model('smpconv_nano', features_only=True), **kwargs)


@pytest.mark.parametrize(('name', 'count'), [
    *((name, count) for name in DETECTORS for count in (1, 0, -3, 4.5)), ('retinanet', None), ('fcos', None)])
def test_class_counts_that_do_not_fit(name, count):
    with pytest.raises(ValueError, match=f'num_classes must be at least 2.*got {count}'):
        getattr(detection, name)(pyramid(), count)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_needs_a_pyramid(name):
    with pytest.raises(ValueError, match='created by fpn_backbone, got str'):
        getattr(detection, name)('smpconv_nano', 4)


@pytest.mark.parametrize('name', ['fasterrcnn', 'maskrcnn'])
def test_boxes_are_pooled_from_octaves(name):
    with pytest.raises(ValueError, match=r'got strides \[4, 16\]'):
        detector(name, returned_layers=(2, 4))


def test_norm_layer_is_an_argument_of_the_network():
    assert not has_batch_norm(pyramid('smpconv_nano', norm_layer='groupnorm1').body)
