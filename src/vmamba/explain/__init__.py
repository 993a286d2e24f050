"""Seeing what a model sees: functions that give numbers first and pictures second. Each is imported when it is used."""

from typing import TYPE_CHECKING

from vmamba import lazy

if TYPE_CHECKING:
    from vmamba.explain.activation_maps import ActivationMaps, activation_maps
    from vmamba.explain.attention import AttentionMatrix, vit_attention
    from vmamba.explain.class_maps import ClassMaps, class_maps
    from vmamba.explain.depth import DepthProfile, depth_profiles, draw_depth
    from vmamba.explain.images import Seen, see
    from vmamba.explain.receptive_field import ReceptiveField, draw_receptive_fields, receptive_field
    from vmamba.explain.resolution import AccuracyBySize, accuracy_by_size, draw_accuracy_by_size
    from vmamba.explain.scaling import Cost, Scaling, draw_scaling, scaling
    from vmamba.explain.scan_patterns import ScanPattern, pattern_figure, save_patterns, scan_pattern
    from vmamba.explain.scans import Recording, Scan, record_scans
    from vmamba.explain.selectivity import Selectivity, selectivity
    from vmamba.explain.stage_maps import StageMaps, stage_maps

__all__ = [
    "AccuracyBySize", "ActivationMaps", "AttentionMatrix", "ClassMaps", "Cost", "DepthProfile", "ReceptiveField",
    "Recording", "Scaling", "Scan", "ScanPattern", "Seen", "Selectivity", "StageMaps", "accuracy_by_size",
    "activation_maps", "class_maps", "depth_profiles", "draw_accuracy_by_size", "draw_depth", "draw_receptive_fields",
    "draw_scaling", "pattern_figure", "receptive_field", "record_scans", "save_patterns", "scaling", "scan_pattern",
    "see", "selectivity", "stage_maps", "vit_attention",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "vmamba.explain.activation_maps": ["ActivationMaps", "activation_maps"],
            "vmamba.explain.attention": ["AttentionMatrix", "vit_attention"],
            "vmamba.explain.class_maps": ["ClassMaps", "class_maps"],
            "vmamba.explain.depth": ["DepthProfile", "depth_profiles", "draw_depth"],
            "vmamba.explain.images": ["Seen", "see"],
            "vmamba.explain.receptive_field": ["ReceptiveField", "draw_receptive_fields", "receptive_field"],
            "vmamba.explain.resolution": ["AccuracyBySize", "accuracy_by_size", "draw_accuracy_by_size"],
            "vmamba.explain.scaling": ["Cost", "Scaling", "draw_scaling", "scaling"],
            "vmamba.explain.scan_patterns": ["ScanPattern", "pattern_figure", "save_patterns", "scan_pattern"],
            "vmamba.explain.scans": ["Recording", "Scan", "record_scans"],
            "vmamba.explain.selectivity": ["Selectivity", "selectivity"],
            "vmamba.explain.stage_maps": ["StageMaps", "stage_maps"],
        },
    )
