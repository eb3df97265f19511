"""The schemas of ExecuTorch's program (.pte), of XNNPACK's graph in a delegate, and of a .ptd.

Tables and fields have the order of ExecuTorch 1.4's ``program.fbs`` and ``flat_tensor.fbs`` and of
its XNNPACK backend's ``schema.fbs``, because the order determines their places in the bytes. Fields
that those schemas call deprecated keep their places and are named ``_`` and a number. Only the
tables that EdgeForge writes are here.
"""

from __future__ import annotations

from typing import Final

from exporters.executorch.flatbuffer import Schema

PROGRAM: Final = Schema(
    """
union KernelTypes: Null Int Bool Double Tensor String IntList DoubleList BoolList TensorList \
OptionalTensorList
union InstructionArguments: KernelCall DelegateCall MoveCall JumpFalseCall FreeCall
table Program: version:uint execution_plan:[ExecutionPlan] constant_buffer:[Buffer] \
backend_delegate_data:[Buffer] segments:[DataSegment] constant_segment:SubsegmentOffsets \
mutable_data_segments:[SubsegmentOffsets] named_data:[NamedData]
table ExecutionPlan: name:string container_meta_type:ContainerMetadata values:[EValue] \
inputs:[int] outputs:[int] chains:[Chain] operators:[Operator] delegates:[BackendDelegate] \
non_const_buffer_sizes:[long]
table ContainerMetadata: encoded_inp_str:string encoded_out_str:string
table EValue: val:KernelTypes
table Null:
table Int: int_val:long
table Bool: bool_val:bool
table Double: double_val:double
table String: string_val:string
table IntList: items:[long]
table DoubleList: items:[double]
table BoolList: items:[bool]
table TensorList: items:[int]
table OptionalTensorList: items:[int]
table Tensor: scalar_type:byte storage_offset:int sizes:[int] dim_order:[ubyte] \
requires_grad:bool data_buffer_idx:uint allocation_info:AllocationDetails layout:byte \
shape_dynamism:byte extra_tensor_info:ExtraTensorInfo
table AllocationDetails: memory_id:uint memory_offset_low:uint memory_offset_high:uint
table ExtraTensorInfo: mutable_data_segments_idx:ulong fully_qualified_name:string location:byte
table Chain: inputs:[int] outputs:[int] instructions:[Instruction]
table Instruction: instr_args:InstructionArguments
table KernelCall: op_index:int args:[int]
table DelegateCall: delegate_index:int args:[int]
table MoveCall: move_from:int move_to:int
table JumpFalseCall: cond_value_index:int destination_instruction:int
table FreeCall: value_index:int
table Operator: name:string overload:string
table BackendDelegate: id:string processed:DelegateDataReference compile_specs:[CompileSpec]
table DelegateDataReference: location:byte index:uint
table CompileSpec: key:string value:[ubyte]
table Buffer: storage:[ubyte]
table DataSegment: offset:ulong size:ulong
table SubsegmentOffsets: segment_index:uint offsets:[ulong]
table NamedData: key:string segment_index:uint
""",
    b"ET12",
)

XNNPACK: Final = Schema(
    """
union XNNQuantParams: PerChannelQuant PerTensorQuant PerTokenDynamicQuant PerChannelGroupQuant
union XValueUnion: XNNTensorValue XNNQuantizedTensorValue
union XNodeUnion: XNNAdd=Node2 XNNFullyConnected XNNSoftmax=Node1 XNNSigmoid=Node1 \
XNNStaticTranspose XNNClamp=Node1 XNNConv2d=Conv XNNDiv=Node2 XNNStaticResizeBilinear2D=Other \
XNNStaticConstantPad=Other XNNAvgPooling2d=Other XNNMinimum=Node2 XNNDepthwiseConv2d=Conv \
XNNMaxPooling2d=Other XNNMultiply=Node2 XNNSubtract=Node2 XNNFloor=Node1 XNNConvert=Node1 \
XNNGlobalAvgPooling2d=Node1 XNNStaticReshape XNNArgMaxPooling2d=Other XNNSquareRoot=Node1 \
XNNCeiling=Node1 XNNHardswish=Node1 XNNLeakyReLU=Other XNNMaximum=Node2 XNNNegate=Node1 \
XNNSquare=Node1 XNNELU=Other XNNAbs=Node1 XNNPReLU=Node2 XNNConcatenate2=Cat \
XNNConcatenate3=Cat XNNConcatenate4=Cat XNNStaticSlice XNNScaledDotProductAttention=Other \
XNNBatchMatrixMultiply=Node2 XNNConcatenate5=Cat XNNConvTranspose2d=Conv \
XNNReciprocalSquareRoot=Node1 XNNLog=Node1 XNNGelu=Node1 XNNTanh=Node1 XNNExp=Node1 XNNSin=Node1 \
XNNCopy=Node1 XNNCos=Node1
table XNNGraph: version:string xnodes:[XNode] xvalues:[XValue] num_externs:uint \
input_ids:[uint] output_ids:[uint] _0:[uint] _1:[uint] constant_data:[ConstantDataOffset]
table XNode: xnode_union:XNodeUnion debug_handle:uint output_min_max:OutputMinMax
table OutputMinMax: output_min:float output_max:float
table XValue: xvalue_union:XValueUnion
table XNNTensorValue: datatype:short num_dims:uint dims:[uint] constant_buffer_idx:uint \
external_id:uint flags:uint id_out:uint
table XNNQuantizedTensorValue: tensor_value:XNNTensorValue quant_params:XNNQuantParams
table PerChannelQuant: scale:[float] channel_dim:int scale_buffer_idx:uint num_scales:uint
table PerTensorQuant: scale:float zero_point:int
table PerTokenDynamicQuant: num_nonbatch_dims:int
table PerChannelGroupQuant: scale:[float] channel_dim:int group_size:int _0:[short] \
scale_buffer_idx:uint num_scales:uint
table ConstantDataOffset: offset:ulong size:ulong named_key:string
table Node1: input_id:uint output_id:uint flags:uint
table Node2: input1_id:uint input2_id:uint output_id:uint flags:uint
table Cat: axis:uint input1_id:uint input2_id:uint input3_id:uint input4_id:uint output_id:uint \
flags:uint input5_id:uint
table XNNFullyConnected: input1_id:uint filter_id:uint bias_id:uint output_id:uint flags:uint
table Conv: padding_top:uint padding_right:uint padding_bottom:uint padding_left:uint \
kernel_height:uint kernel_width:uint subsampling_height:uint subsampling_width:uint \
dilation_height:uint dilation_width:uint group_input_channels:uint group_output_channels:uint \
groups:uint adjustment_height:uint adjustment_width:uint input1_id:uint filter_id:uint \
bias_id:uint output_id:uint flags:uint
table XNNStaticTranspose: num_dims:uint perm:[uint] input_id:uint output_id:uint flags:uint
table XNNStaticReshape: num_dims:uint new_shape:[uint] input_id:uint output_id:uint flags:uint
table XNNStaticSlice: num_dims:uint offsets:[uint] sizes:[uint] input_id:uint output_id:uint \
flags:uint
table Other:
""",
    b"XN01",
)

FLAT_TENSOR: Final = Schema(
    """
table FlatTensor: version:uint segments:[DataSegment] named_data:[NamedData]
table DataSegment: offset:ulong size:ulong
table NamedData: key:string segment_index:uint tensor_layout:TensorLayout
table TensorLayout: scalar_type:byte sizes:[int] dim_order:[ubyte]
""",
    b"FT01",
)
