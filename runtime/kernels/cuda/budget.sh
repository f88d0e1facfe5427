#!/bin/sh
# Compile launcher of nvcc: the build fails where a kernel is over its budget.
#
#   sh budget.sh budgets.txt nvcc ARGUMENTS…
#
# A stack frame means that an array lies in local memory, which is device memory: "0 spills" does not exclude it.
# ptxas tells the rest in passing: wgmma that it serializes, a setmaxnreg that it ignores.
budgets=$1
shift
report=$(mktemp) || exit 1
trap 'rm -f "$report"' EXIT

"$@" -Xptxas -v >"$report" 2>&1
code=$?
cat "$report"
[ $code -eq 0 ] || exit $code
case " $* " in
  *sm_*) ;;
  *) exit 0 ;;  # PTX only, or no compilation
esac

awk '
  FILENAME == ARGV[1] {
    if ($0 !~ /^#/ && NF) { pattern[++count] = $1; where[count] = $2; most[count] = $3 }
    next
  }
  function over(name, what) { print "budget: " name " for " architecture ": " what; failed = 1 }
  function budget(i) {
    for (i = 1; i <= count; ++i) {
      if (kernel ~ pattern[i] && (where[i] == "*" || where[i] == architecture)) return most[i] + 0
    }
    return 255
  }
  /Compiling entry function/ { split($0, quoted, "\047"); kernel = quoted[2]; architecture = quoted[4]; ++kernels }
  /Function properties for/ { name = $NF }  # the kernel, or a function that it calls
  /bytes stack frame/ {
    if ($1 > 0) over(name, $1 " bytes stack frame, none allowed")
    if ($5 > 0 || $9 > 0) over(name, $5 " bytes spill stores and " $9 " bytes spill loads, none allowed")
  }
  / Used [0-9]+ registers/ {
    for (i = 1; $i != "Used";) ++i
    if ($(i + 1) > budget()) over(kernel, $(i + 1) " registers, its budget is " budget())
  }
  /Potential Performance Loss|setmaxnreg.*ignored/ { print "budget: " $0; failed = 1 }
  END {
    if (!kernels) { print "budget: ptxas reported no kernel"; failed = 1 }
    exit failed
  }
' "$budgets" "$report" && exit 0
# On a machine that is lent for minutes a slow kernel is better than none.
[ "$QCOMPILE_BUDGET" = warn ] && exit 0

# A rule that fails must not leave an object that a later run takes for done.
while [ $# -gt 1 ]; do
  [ "$1" = -o ] && rm -f "$2"
  shift
done
exit 1
