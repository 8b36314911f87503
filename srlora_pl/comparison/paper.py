"""The paper's numbers (Tables 3 and 4), in percent: by config, method and score."""

GLUE_CONFIGS = tuple(f"deberta_{task}_srlora" for task in ("sst2", "mrpc", "cola", "qnli", "rte", "stsb"))
VISION_CONFIGS = tuple(f"vit_{data}_srlora" for data in ("cifar100", "stl10", "mnist"))
# By --table: the configs and the methods of the paper's whole grid.
TABLES = {"3": (GLUE_CONFIGS, ("lora", "pissa", "srlora")), "4": (VISION_CONFIGS, ("lora", "srlora"))}

NUMBERS: dict[str, dict[str, dict[str, float]]] = {
    "deberta_sst2_srlora": {"lora": {"accuracy": 95.9}, "pissa": {"accuracy": 95.7}, "srlora": {"accuracy": 96.1}},
    "deberta_mrpc_srlora": {
        "lora": {"f1": 90.8, "accuracy": 87.5},
        "pissa": {"f1": 90.5, "accuracy": 87.2},
        "srlora": {"f1": 90.3, "accuracy": 86.6},
    },
    "deberta_cola_srlora": {"lora": {"matthews": 65.4}, "pissa": {"matthews": 64.7}, "srlora": {"matthews": 65.1}},
    "deberta_qnli_srlora": {"lora": {"accuracy": 94.0}, "pissa": {"accuracy": 94.4}, "srlora": {"accuracy": 93.4}},
    # LoRA's number is not readable in the copy at hand.
    "deberta_rte_srlora": {"pissa": {"accuracy": 82.0}, "srlora": {"accuracy": 82.1}},
    "deberta_stsb_srlora": {
        "lora": {"pearson": 90.5, "spearman": 89.8},
        "pissa": {"pearson": 89.6, "spearman": 89.0},
        "srlora": {"pearson": 90.4, "spearman": 90.2},
    },
    "vit_cifar100_srlora": {"lora": {"accuracy": 90.06}, "srlora": {"accuracy": 92.51}},
    "vit_stl10_srlora": {"lora": {"accuracy": 99.62}, "srlora": {"accuracy": 99.54}},
    "vit_mnist_srlora": {"lora": {"accuracy": 98.89}, "srlora": {"accuracy": 94.83}},
}
