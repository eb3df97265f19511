// What _portable_lib wants of torch's Python bindings, and never calls without torch: pybind11's
// casts of a tensor from Python, which say that nothing is one, and to Python.
	.text
	.globl _ZN8pybind116detail11type_casterIN2at6TensorEvE4loadENS_6handleEb
	.type _ZN8pybind116detail11type_casterIN2at6TensorEvE4loadENS_6handleEb,%function
_ZN8pybind116detail11type_casterIN2at6TensorEvE4loadENS_6handleEb:
	mov w0, #0
	ret
	.globl _ZN8pybind116detail11type_casterIN2at6TensorEvE4castERKS3_NS_19return_value_policyENS_6handleE
	.type _ZN8pybind116detail11type_casterIN2at6TensorEvE4castERKS3_NS_19return_value_policyENS_6handleE,%function
_ZN8pybind116detail11type_casterIN2at6TensorEvE4castERKS3_NS_19return_value_policyENS_6handleE:
	mov x0, #0
	ret
	.section .note.GNU-stack,"",%progbits
