"""What a training run takes, found before it is started: memory of each GPU, arithmetic, time.

    trace     the real model's forward and backward pass on tensors without data -> bytes alive at the peak, FLOPs
    zero      DeepSpeed's copies of parameters, gradients and moments, by ZeRO stage
    timing    the real step of a model with two layers, executed here -> seconds a layer and of the rest
    planner   all of it for a run -> Plan
    fit       which changes of the settings make a run fit
    report    Plan -> text
"""
