"""What the paper's tables hold (arXiv 2604.13197v2, as it stands in its release), by table and base model.

Accuracies and F1 are in percent. `AVERAGE` is the paper's own last column, as printed. Tables 6 and 10,
Figure 6 and section 4.3.3 are of fewer base models. `fig6` is Table 8 (Qwen3-0.6B) and the two panels of
Figure 6 (Llama3.2-1B: means of the last ten of a curve's 95 points, taken from the PDF's lines by the axes'
ticks), None where the paper has no number.
"""

AVERAGE = "Avg."
BASE_MODELS = ("qwen3-0.6b", "qwen3-8b", "llama3.2-1b", "llama3.2-3b")
BENCHMARKS = ("AIME", "MATH-500", "Minerva", "Olympiad", "AMC")
POLICY_COLUMNS = (*BENCHMARKS, AVERAGE)

COLUMNS: dict[str, tuple[str, ...]] = {
    "table1": (*(f"{name} @{n}" for name in ("MATH-500", "Minerva") for n in (4, 16, 64)), AVERAGE),
    "table2": ("GSM8K", "MATH", "Olympiad", "OmniMath", AVERAGE),
    "table5": POLICY_COLUMNS,
    "table6": POLICY_COLUMNS,
    "table10": ("Best-of-N", "ProcessBench"),
    "fig6": (*POLICY_COLUMNS, "rollouts", "RM acc."),
    "sec433": ("Pearson of TD", "AUC of |V|"),
}

Rows = dict[str, tuple[float | None, ...]]
NONE = (None,) * len(POLICY_COLUMNS)
PAPER: dict[str, dict[str, Rows]] = {
    "table1": {
        "qwen3-0.6b": {
            "Q-RM": (41.4, 44.4, 44.6, 9.2, 12.1, 10.7, 27.1),
            "EndoRM": (32.0, 33.8, 38.8, 6.3, 8.8, 7.7, 21.2),
            "DPO-RM": (41.6, 42.6, 42.2, 10.7, 9.9, 11.0, 26.3),
            "Implicit PRM": (39.6, 39.6, 38.6, 10.3, 11.4, 11.0, 25.1),
            "IPVRM": (42.0, 46.0, 47.6, 10.3, 11.0, 11.4, 28.1),
        },
        "qwen3-8b": {
            "Q-RM": (66.8, 69.0, 68.8, 26.5, 27.0, 25.7, 47.3),
            "EndoRM": (60.6, 61.0, 57.6, 19.5, 22.8, 21.7, 40.5),
            "DPO-RM": (66.6, 68.0, 69.8, 24.3, 24.6, 26.8, 46.7),
            "Implicit PRM": (66.4, 68.0, 70.2, 24.6, 24.3, 26.5, 46.7),
            "IPVRM": (66.8, 67.6, 69.2, 25.4, 25.0, 26.8, 46.8),
        },
        "llama3.2-1b": {
            "Q-RM": (13.6, 14.6, 13.4, 2.2, 2.6, 3.3, 8.3),
            "EndoRM": (10.4, 10.6, 10.0, 1.1, 1.8, 2.2, 6.0),
            "DPO-RM": (11.2, 12.6, 12.6, 3.3, 3.7, 2.9, 7.7),
            "Implicit PRM": (13.0, 14.0, 14.2, 2.9, 2.6, 3.7, 8.4),
            "IPVRM": (13.9, 14.2, 14.8, 1.5, 2.6, 4.4, 8.6),
        },
        "llama3.2-3b": {
            "Q-RM": (29.0, 31.4, 33.8, 5.9, 9.9, 8.1, 19.7),
            "EndoRM": (25.4, 26.8, 27.0, 5.9, 4.8, 5.5, 15.9),
            "DPO-RM": (29.2, 31.6, 34.6, 6.3, 9.9, 7.7, 19.9),
            "Implicit PRM": (29.8, 32.8, 35.4, 5.9, 9.2, 8.5, 20.3),
            "IPVRM": (30.6, 34.6, 35.8, 7.0, 8.5, 7.7, 20.7),
        },
    },
    "table2": {
        "qwen3-0.6b": {
            "Q-RM": (47.2, 38.9, 31.7, 35.0, 38.2),
            "EndoRM": (33.7, 30.1, 26.9, 31.5, 30.6),
            "DPO-RM": (32.1, 32.7, 23.5, 22.9, 27.8),
            "Implicit PRM": (30.3, 31.0, 21.5, 18.8, 25.4),
            "IPVRM": (52.8, 42.1, 30.0, 31.3, 39.1),
        },
        "qwen3-8b": {
            "Q-RM": (61.0, 45.2, 39.5, 35.3, 45.3),
            "EndoRM": (35.0, 30.9, 28.1, 29.3, 30.8),
            "DPO-RM": (52.2, 48.2, 36.0, 33.3, 42.4),
            "Implicit PRM": (51.6, 47.8, 36.4, 33.1, 42.2),
            "IPVRM": (57.2, 47.8, 38.8, 38.6, 45.6),
        },
        "llama3.2-1b": {
            "Q-RM": (29.7, 30.4, 22.9, 26.3, 27.3),
            "EndoRM": (33.5, 29.2, 26.0, 32.0, 30.2),
            "DPO-RM": (38.7, 27.9, 21.2, 22.0, 27.5),
            "Implicit PRM": (37.8, 28.9, 21.4, 23.5, 27.9),
            "IPVRM": (42.7, 35.2, 28.7, 29.2, 34.0),
        },
        "llama3.2-3b": {
            "Q-RM": (42.7, 37.5, 34.4, 36.1, 37.7),
            "EndoRM": (32.5, 28.9, 23.9, 29.7, 28.8),
            "DPO-RM": (41.2, 33.9, 25.1, 27.4, 31.9),
            "Implicit PRM": (39.9, 33.9, 23.4, 22.9, 30.0),
            "IPVRM": (48.1, 38.7, 32.1, 34.2, 38.3),
        },
    },
    "table5": {
        "qwen3-0.6b": {
            "SFT": (0.4, 33.2, 7.3, 7.6, 9.3, 11.6),
            "PRIME": (1.1, 39.6, 11.4, 11.4, 12.3, 15.2),
            "SPRO": (1.7, 38.6, 10.7, 11.6, 13.7, 15.3),
            "Reinforce w/ Q-RM": (1.1, 36.4, 9.2, 11.0, 10.8, 13.7),
            "GRPO w/ VR": (0.8, 38.3, 10.5, 10.5, 12.5, 14.5),
            "GRPO w/ DPO-RM": (0.8, 38.4, 9.8, 10.0, 11.1, 14.0),
            "GRPO w/ IPVRM": (1.2, 41.5, 12.1, 12.9, 13.9, 16.3),
            "DistRL w/ IPVRM": (1.5, 42.5, 13.3, 12.1, 14.0, 16.7),
        },
        "qwen3-8b": {
            "SFT": (3.1, 60.8, 30.9, 20.6, 28.3, 28.7),
            "PRIME": (5.7, 67.9, 34.3, 30.8, 33.4, 34.4),
            "SPRO": (5.6, 68.7, 35.8, 32.2, 34.0, 35.3),
            "Reinforce w/ Q-RM": (3.6, 65.5, 34.2, 32.2, 31.6, 33.4),
            "GRPO w/ VR": (5.7, 65.4, 33.5, 29.7, 33.4, 33.5),
            "GRPO w/ DPO-RM": (4.2, 67.9, 36.4, 31.8, 31.3, 34.3),
            "GRPO w/ IPVRM": (6.7, 70.9, 35.2, 33.8, 35.1, 36.3),
            "DistRL w/ IPVRM": (8.2, 70.7, 38.4, 34.1, 37.3, 37.7),
        },
        "llama3.2-1b": {
            "SFT": (0.3, 10.7, 1.7, 2.2, 2.9, 3.6),
            "PRIME": (0.1, 11.5, 2.4, 2.0, 3.6, 3.9),
            "SPRO": (0.1, 11.4, 3.2, 2.5, 5.0, 4.4),
            "Reinforce w/ Q-RM": (0.1, 10.8, 2.5, 2.5, 5.0, 4.2),
            "GRPO w/ VR": (0.0, 11.0, 3.2, 2.5, 4.2, 4.2),
            "GRPO w/ DPO-RM": (0.4, 11.2, 3.2, 2.8, 4.8, 4.5),
            "GRPO w/ IPVRM": (0.1, 13.2, 2.6, 3.0, 4.5, 4.7),
            "DistRL w/ IPVRM": (0.1, 13.2, 3.4, 3.1, 4.2, 4.8),
        },
        "llama3.2-3b": {
            "SFT": (0.4, 27.5, 6.0, 5.6, 7.1, 9.3),
            "PRIME": (0.4, 26.6, 7.5, 5.2, 6.5, 9.2),
            "SPRO": (0.1, 27.2, 5.6, 5.4, 4.5, 8.6),
            "Reinforce w/ Q-RM": (0.1, 27.4, 5.9, 5.1, 7.7, 9.2),
            "GRPO w/ VR": (0.1, 29.8, 6.8, 5.6, 6.9, 9.8),
            "GRPO w/ DPO-RM": (0.3, 26.5, 5.6, 5.1, 6.6, 8.8),
            "GRPO w/ IPVRM": (0.4, 26.9, 8.6, 5.7, 8.1, 9.9),
            "DistRL w/ IPVRM": (0.6, 26.6, 8.4, 6.5, 9.2, 10.3),
        },
    },
    "table6": {
        "qwen3-0.6b": {
            "GRPO w/ DPO-RM": (0.8, 38.4, 9.8, 10.0, 11.1, 14.0),
            "DistRL w/ DPO-RM": (0.8, 37.2, 9.4, 10.1, 13.0, 14.1),
            "GRPO w/ Implicit PRM": (1.2, 34.9, 10.2, 9.5, 10.8, 13.3),
            "DistRL w/ Implicit PRM": (0.8, 37.1, 10.9, 10.5, 14.2, 14.7),
            "GRPO w/ IPVRM": (1.2, 41.5, 12.1, 12.9, 13.9, 16.3),
            "DistRL w/ IPVRM": (1.5, 42.5, 13.3, 12.1, 14.0, 16.7),
        },
        "llama3.2-1b": {
            "GRPO w/ DPO-RM": (0.4, 11.2, 3.2, 2.8, 4.8, 4.5),
            "DistRL w/ DPO-RM": (0.3, 12.5, 2.8, 2.7, 5.0, 4.7),
            "GRPO w/ Implicit PRM": (0.3, 12.8, 2.8, 2.5, 3.9, 4.5),
            "DistRL w/ Implicit PRM": (0.4, 13.7, 3.1, 2.4, 3.9, 4.7),
            "GRPO w/ IPVRM": (0.1, 13.2, 2.6, 3.0, 4.5, 4.7),
            "DistRL w/ IPVRM": (0.1, 13.2, 3.4, 3.1, 4.2, 4.8),
        },
    },
    "table10": {"qwen3-0.6b": {"m = 0": (26.1, 37.0), "m = 5": (28.1, 39.1), "m = 10": (27.5, 39.1)}},
    "fig6": {
        "qwen3-0.6b": {
            "Implicit PRM, naive": (0.8, 37.1, 10.9, 10.5, 14.2, 14.7, None, None),
            "naive": (1.0, 40.8, 11.2, 12.2, 12.0, 15.4, None, None),
            "both": (1.2, 40.8, 13.1, 12.3, 13.6, 16.2, None, None),
        },
        "llama3.2-1b": {
            "frozen": (*NONE, 7.4, 49.3),
            "naive": (*NONE, 3.2, 50.3),
            "DLW": (*NONE, 7.8, 52.4),
            "ADB": (*NONE, 6.3, 57.0),
            "both": (*NONE, 8.7, 58.3),
        },
    },
    "sec433": {"qwen3-0.6b": {"one-step TD": (0.0226, 0.64)}},
}
