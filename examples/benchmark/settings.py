"""What all sides are told alike, whatever their own defaults are."""

SEED = 0

LEARNING_RATE = 1e-5  # constant, without warm-up and weight decay
MAX_GRAD_NORM = 1.0  # of DPO and the reward model; PPO does not clip

MINIBATCH = 4
KL_COEF = 0.05
VALUE_COEF = 0.1
CLIP = 0.2
GAMMA = 1.0
LAM = 0.95
REWARD_MAX_LENGTH = 512  # tokens of a text that PPO's reward model reads: all of them

BETA = 0.1
